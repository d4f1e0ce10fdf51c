"""Frozen text encoders: prompts in, one vector a token out. (B,) strings -> float32 (B, L, D), always L tokens.

`WordTable` serves the small world, whose every caption is made of a few dozen known words: random vectors are as good
as learned ones there, since nothing of a word's meaning needs to be known beforehand. But attention sees a set, and
"a red circle left of a blue star" is the same set of words as its contrary. A contextual encoder tells them apart, so
each token carries, beside its own word, the word before it and its position. `T5` is the encoder of CogVideoX and of
the paper, read from a local folder.

Both pad to a fixed length with ordinary tokens that are attended to, as CogVideoX was trained; so no mask exists
anywhere downstream. The text encoder is part of what a model was trained with: `fingerprint` names it, and caches and
checkpoints refuse another. `null` is the embedding of the empty prompt, which guidance needs (Eq. 9).
"""

import difflib
import hashlib
import json
import math
import re
import warnings
from pathlib import Path

import torch

from common import UserError, uses_bfloat16
from world import shapes


class WordTable:
    """One frozen random vector a word. `words` is the vocabulary, in an order that is part of its identity.

    A token is (its word dim/2 | the word before dim/4 | its position dim/4), each of about unit variance.
    """

    def __init__(self, words, dim=128, length=20, seed=0, device="cpu"):
        if dim % 8:
            raise ValueError(f"dim must be a multiple of 8, got {dim}")
        words = [w.lower() for w in words]
        if len(set(words)) != len(words):
            raise ValueError("a word stands twice in the vocabulary")
        self.dim, self.length, self.dtype = dim, length, torch.float32
        self.index = {word: i for i, word in enumerate(words)}
        self.fingerprint = _sha(["words", words, dim, length, seed])
        pad, random = len(words), torch.Generator().manual_seed(seed)
        self.word = torch.randn(pad + 1, dim // 2, generator=random).to(device)  # the last row is the padding's
        self.before = torch.randn(pad + 1, dim // 4, generator=random).to(device)
        self.before[pad] = 0.0  # nothing stands before the first word
        rate = length ** -(torch.arange(dim // 8) / (dim // 8))  # from one radian a word to about one a prompt
        angle = torch.arange(length + 1)[:, None] * rate  # (L + 1, D / 8); the last row is the padding's
        self.position = (math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)).to(device)
        self.device = self.word.device
        self.null = self.encode([""])  # (1, L, D)

    def encode(self, prompts):
        """list of B prompts -> float32 (B, L, D). Case and punctuation do not count.

        Raises UserError for an unknown word, with the nearest known ones. Words beyond `length` are cut with a warning.
        """
        pad = len(self.index)
        tokens = torch.full((len(prompts), self.length), pad)
        for row, prompt in zip(tokens, prompts):
            words = self._words(prompt)
            row[: len(words)] = torch.tensor([self.index[w] for w in words])
        tokens = tokens.to(self.device)
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=pad)
        before = before.masked_fill(tokens == pad, pad)  # every padding token is the same
        place = torch.arange(self.length, device=self.device).where(tokens != pad, self.length)
        return torch.cat([self.word[tokens], self.before[before], self.position[place]], dim=2)  # (B, L, D)

    def _words(self, prompt):
        words = re.findall(r"\w+(?:['-]\w+)*", prompt.lower())
        for word in words:
            if word not in self.index:
                near = difflib.get_close_matches(word, self.index, n=3, cutoff=0.5)
                hint = f"the nearest are {', '.join(near)}" if near else "try " + ", ".join(list(self.index)[:8])
                raise UserError(f"unknown word {word!r} in the prompt {prompt!r}: {hint}")
        if len(words) > self.length:
            _warn(self.length, "words")
        return words[: self.length]


class T5:
    """A T5 encoder in a folder: transformers' layout, or a CogVideoX folder with text_encoder/ and tokenizer/ in it.

    As CogVideoX calls it: padded to `length` tokens (226 there, 256 in the paper) without an attention mask.
    `close()` frees the weights; `null`, `dim`, `length` and `fingerprint` stay. Raises UserError if the folder does
    not hold a whole T5 encoder and its tokenizer.
    """

    def __init__(self, folder, length=226, dtype=torch.bfloat16, device="cpu"):
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds, and the small world does without

        folder = Path(folder)
        inside = (folder / "text_encoder").is_dir()
        model, tokenizer = (folder / "text_encoder", folder / "tokenizer") if inside else (folder, folder)
        if not (model / "config.json").is_file():
            raise UserError(f"no T5 encoder in {folder}: {model / 'config.json'} is missing")
        if (kind := json.loads((model / "config.json").read_text()).get("model_type")) != "t5":
            raise UserError(f"{model} holds a {kind} model, not a T5 encoder")
        if not any((tokenizer / name).is_file() for name in ("spiece.model", "tokenizer.json")):
            raise UserError(f"no tokenizer in {tokenizer}: neither spiece.model nor tokenizer.json is there")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            self.model, report = T5EncoderModel.from_pretrained(
                model, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as e:  # transformers raises a dozen kinds for files that are missing, cut or foreign
            raise UserError(f"cannot load T5 from {folder}: {str(e).splitlines()[0]}") from e
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"cannot load T5 from {model}: {len(missing)} weights are missing, first {missing[0]}")
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.dim, self.length, self.dtype, self.device = self.model.config.d_model, length, dtype, torch.device(device)
        config = self.model.config.to_dict()
        weights = list(self.model.parameters())
        some = [p.flatten()[:16].bfloat16().tolist() for p in weights[:: 1 + len(weights) // 8]]  # in any precision
        same = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
        self.fingerprint = _sha(["t5", [config[k] for k in same], some, length])
        self.null = self.encode([""])  # (1, L, D)

    @torch.no_grad()
    def encode(self, prompts):
        """list of B prompts -> float32 (B, L, D). Tokens beyond `length` are cut, with a warning."""
        tokens = self.tokenizer(prompts, verbose=False).input_ids
        if max(map(len, tokens), default=0) > self.length:
            _warn(self.length, "tokens")
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True).input_ids
        return self.model(torch.tensor(tokens, device=self.device)).last_hidden_state.float()  # (B, L, D)

    def close(self):
        """Free the weights."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _warn(length, unit):
    warnings.warn(f"a prompt is longer than {length} {unit} and was cut", stacklevel=4)


def _sha(identity):
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def load_encoder(name, dim=128, length=20, device="cpu", precision="auto"):
    """The encoder a flag names: "words", the small world's table with vectors of `dim`, or a T5 folder."""
    if name == "words":
        return WordTable(shapes.WORDS, dim, length)
    return T5(name, length, torch.bfloat16 if uses_bfloat16(precision, device) else torch.float32, device)
