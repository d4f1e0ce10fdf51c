"""text.py: the word table's three parts, and T5 as CogVideoX calls it, on a tiny T5 and tokenizers made here."""

import json
import shutil

import pytest
import torch

from common import UserError
from text import T5, WordTable

WORDS = ["a", "red", "blue", "circle", "star", "left", "of", "moves"]


def test_word_table_is_made_of_word_word_before_and_position():
    table = WordTable(WORDS, dim=64, length=6, seed=3)
    x = table.encode(["A red, circle!", "circle red circle of"])
    assert x.shape == (2, 6, 64) and x.dtype == torch.float32
    word, before, place = x.split([32, 16, 16], 2)
    assert torch.equal(word[0, 2], word[1, 0]) and torch.equal(word[0, 2], word[1, 2])  # circle is circle
    assert torch.equal(before[0, 2], before[1, 2])  # red stands before both
    assert not torch.equal(before[1, 2], before[1, 3])
    assert (before[:, 0] == 0).all()  # nothing stands before the first
    assert torch.equal(place[0, :3], place[1, :3])
    assert len(place[1, :4].unique(dim=0)) == 4
    assert len({tuple(v.tolist()) for v in word[:, :3].flatten(0, 1)}) == 3
    # positions rotate at constant speed: neighbours have the same product everywhere
    full = table.encode(["a " * 6])[0, :, 48:]
    products = (full[:-1] * full[1:]).sum(1)
    assert torch.allclose(products, products[0].expand(5), atol=1e-4) and products[0] < 16


def test_word_table_tells_who_is_what():
    """The same words in another order are another set of tokens, even with the positions left out."""
    table = WordTable(WORDS, dim=64, length=8)
    a, b = (table.encode([p])[0, :, :48] for p in ("red circle left of blue star", "blue circle left of red star"))
    assert {tuple(v.tolist()) for v in a} != {tuple(v.tolist()) for v in b}


def test_word_table_has_unit_variance():
    x = WordTable([f"w{i}" for i in range(400)], dim=128, length=200).encode([" ".join(f"w{i}" for i in range(200))])
    for part in x[:, 1:].split([64, 32, 32], 2):
        assert part.square().mean().item() == pytest.approx(1.0, abs=0.05)


def test_padding_is_one_constant_token_and_the_empty_prompt_is_all_of_it():
    table = WordTable(WORDS, dim=64, length=6)
    x = table.encode(["a red", "", " ,!"])
    pad = x[1, 0]
    assert torch.equal(x[1], pad.expand(6, -1)) and torch.equal(x[0, 2:], pad.expand(4, -1))
    assert torch.equal(x[2], x[1]) and torch.equal(table.encode([""]), x[1:2])
    assert not (x[0, :2] == pad).all(1).any()
    full = table.encode(["a a a a a a"])
    assert not (full[0, :, 48:] == pad[48:]).all(1).any()  # nor does a word ever stand at its position
    assert table.encode([]).shape == (0, 6, 64)


def test_word_table_is_frozen_and_seeded():
    state = torch.get_rng_state()
    a, b, c = (WordTable(WORDS, seed=seed).encode(["a red star"]) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())
    assert not a.requires_grad


def test_fingerprints_differ_with_everything_that_counts():
    made = [WordTable(WORDS), WordTable(WORDS[::-1]), WordTable(WORDS, dim=64), WordTable(WORDS, length=31)]
    made += [WordTable(WORDS, seed=1), WordTable([*WORDS, "ring"])]
    assert len({table.fingerprint for table in made}) == 6
    assert WordTable(WORDS).fingerprint == made[0].fingerprint


def test_unknown_words_are_named_with_the_known_ones():
    table = WordTable(WORDS)
    with pytest.raises(UserError, match="'cirle' in 'a red cirle'; known are a, red, blue, circle"):
        table.encode(["a red", "a red cirle"])
    with pytest.raises(UserError, match="café"):
        table.encode(["red café"])


def test_hyphens_and_apostrophes_are_part_of_a_word():
    table = WordTable(["black-and-white", "it's", "red"])
    assert torch.equal(table.encode(["Red - black-and-white; 'it's'"]), table.encode(["red black-and-white it's"]))


def test_too_long_a_prompt_is_cut_with_a_warning():
    table = WordTable(WORDS, length=3)
    with pytest.warns(UserWarning, match="longer than 3 words"):
        x = table.encode(["a red star moves left", "a blue star moves left"])
    assert torch.equal(x[:1], table.encode(["a red star"]))


# ---------------------------------------------------------------------------------------------------------------------
# T5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CogVideoX-like folder: text_encoder/ with a random T5, tokenizer/ with a sentencepiece file, as published."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("cogvideox")
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(root / "text_encoder")
    (root / "tokenizer").mkdir()
    (root / "corpus").write_text("a red circle moves left\nthe quick dog jumps over many words\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus"), model_prefix=str(root / "tokenizer" / "spiece"), vocab_size=60,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226, **special}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
    return root


def test_t5_is_called_as_cogvideox_calls_it(folder):
    """Padded with <pad>, ended with </s>, and the padding attended to: the same as transformers without a mask."""
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["a red circle", ""]).input_ids
    assert ids[0][-1] == 1 and ids[1] == [1] and len(ids[0]) > 3
    padded = torch.tensor([row + [0] * (40 - len(row)) for row in ids])
    with torch.no_grad():
        want, masked = model(padded)[0], model(padded, attention_mask=(padded != 0).long())[0]
    ours = T5(folder, length=40, dtype=torch.float32)
    got = ours.encode(["a red circle", ""])
    assert got.shape == (2, 40, 32) and got.dtype == torch.float32 and not got.requires_grad
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, masked, atol=1e-2)
    assert torch.allclose(ours.encode([""]), want[1:], atol=1e-5)
    assert (ours.dim, ours.length) == (32, 40)


def test_t5_defaults_to_bfloat16_and_226_tokens(folder):
    ours = T5(folder)
    null = ours.encode([""])
    assert null.shape == (1, 226, 32) and null.dtype == torch.float32
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in ours.model.parameters())


def test_t5_from_one_plain_folder_with_a_tokenizer_json(folder, tmp_path):
    """Any T5, whole or encoder only, with the fast tokenizers' file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    for file in (folder / "text_encoder").iterdir():
        shutil.copy(file, tmp_path)
    ours = T5(tmp_path, length=6, dtype=torch.float32)
    with torch.no_grad():
        want = ours.model(torch.tensor([[3, 4, 5, 1, 0, 0]]))[0]
    assert torch.equal(ours.encode(["a red circle"]), want)


def test_t5_cuts_long_prompts(folder):
    ours, whole = T5(folder, length=8, dtype=torch.float32), T5(folder, length=60, dtype=torch.float32)
    prompts = ["a red circle moves left " * 9, "a"]
    tokens = [whole.tokenizer(prompt).input_ids for prompt in prompts]
    assert len(tokens[0]) > 60 and ours.encode(prompts).shape == (2, 8, 32)
    with torch.no_grad():
        want = ours.model(torch.tensor([tokens[0][:7] + tokens[0][-1:]]))[0]
    assert torch.allclose(ours.encode(prompts[:1]), want, atol=1e-5)


def test_t5_fingerprint(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    first = T5(folder, length=8).fingerprint
    assert T5(folder, length=8).fingerprint == first != T5(folder, length=9).fingerprint
    other = shutil.copytree(folder, tmp_path / "other")
    assert T5(other, length=8).fingerprint == first  # the place does not count
    weights = load_file(other / "text_encoder" / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, other / "text_encoder" / "model.safetensors", {"format": "pt"})
    assert T5(other, length=8).fingerprint != first


def spoil(root, how):
    from safetensors.torch import load_file, save_file

    file = root / "text_encoder" / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif how == "a weight is gone":
        weights = load_file(file)
        del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
        save_file(weights, file, {"format": "pt"})
    elif how == "no weights":
        file.unlink()
    elif how == "no tokenizer":
        (root / "tokenizer" / "spiece.model").unlink()
    elif how == "another model":
        (root / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    else:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    "how, says",
    [
        ("cut", "cannot load T5"),
        ("a weight is gone", "1 weights are missing, first encoder.block.1.layer.0.SelfAttention.q.weight"),
        ("no weights", "cannot load T5"),
        ("no tokenizer", "no T5 encoder in"),
        ("another model", "cannot load T5"),
        ("no folder", "no T5 encoder in"),
    ],
)
def test_t5_bad_folders(folder, tmp_path, how, says):
    root = shutil.copytree(folder, tmp_path / "bad")
    spoil(root, how)
    with pytest.raises(UserError, match=says):
        T5(root, length=8)
