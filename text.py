"""Frozen text encoders: prompts in, one vector a token out. (B,) strings -> float32 (B, L, D), always L tokens.

`WordTable` serves the small world, whose every caption is made of a few dozen known words: random vectors are as good
as learned ones there, since nothing of a word's meaning needs to be known beforehand. But attention sees a set, and
"a red circle left of a blue star" is the same set of words as its contrary. A contextual encoder tells them apart, so
each token carries, beside its own word, the word before it and its position. `T5` is the encoder of CogVideoX and of
the paper, read from a local folder.

Both pad to a fixed length with ordinary tokens that are attended to, as CogVideoX was trained; so no mask exists
anywhere downstream. The text encoder is part of what a model was trained with: `fingerprint` names it, and caches and
checkpoints refuse another. Guidance needs the empty prompt's embedding as well (Eq. 9).
"""

import hashlib
import json
import math
import textwrap
import warnings

import torch

from cogvideox import below
from common import UserError, uses_bfloat16
from world import shapes


class WordTable:
    """One frozen random vector a word. `words` is the vocabulary, in an order that is part of its identity.

    A token is (its word dim/2 | the word before dim/4 | its position dim/4), each of about unit variance.
    """

    def __init__(self, words, dim=128, length=20, seed=0):
        self.dim, self.length, self.dtype = dim, length, torch.float32
        self.index = {word: i for i, word in enumerate(words)}
        self.fingerprint = _sha(["words", words, dim, length, seed])
        pad, random = len(words), torch.Generator().manual_seed(seed)
        self.word = torch.randn(pad + 1, dim // 2, generator=random)  # the last row is the padding's
        self.before = torch.randn(pad + 1, dim // 4, generator=random)
        self.before[pad] = 0.0  # nothing stands before the first word
        rate = length ** -(torch.arange(dim // 8) / (dim // 8))  # from one radian a word to about one a prompt
        angle = torch.arange(length + 1)[:, None] * rate  # (L + 1, D / 8); the last row is the padding's
        self.position = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)

    def encode(self, prompts):
        """list of B prompts -> float32 (B, L, D). Case and punctuation do not count.

        Raises UserError for an unknown word. Words beyond `length` are cut with a warning.
        """
        pad = len(self.index)
        tokens = torch.full((len(prompts), self.length), pad)
        for row, prompt in zip(tokens, prompts):
            words = shapes.words_of(prompt)
            if len(words) > self.length:
                warnings.warn(f"a prompt is longer than {self.length} words and was cut", stacklevel=2)
            for i, word in enumerate(words[: self.length]):
                if word not in self.index:
                    short = textwrap.shorten(prompt, 100, placeholder=" ...")
                    raise UserError(f"unknown word {word!r} in {short!r}; known are {', '.join(self.index)}")
                row[i] = self.index[word]
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=pad)
        before = before.masked_fill(tokens == pad, pad)  # every padding token is the same
        place = torch.arange(self.length).where(tokens != pad, self.length)
        return torch.cat([self.word[tokens], self.before[before], self.position[place]], dim=2)  # (B, L, D)


class T5:
    """A T5 encoder in a folder: transformers' layout, or a CogVideoX folder with text_encoder/ and tokenizer/ in it.

    As CogVideoX calls it: padded to `length` tokens (226 there, 256 in the paper) without an attention mask.
    Raises UserError if the folder does not hold a whole T5 encoder and its tokenizer.
    """

    def __init__(self, folder, length=226, dtype=torch.bfloat16, device="cpu"):
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds, and the small world does without

        model, tokenizer = below(folder, "text_encoder"), below(folder, "tokenizer")
        words = any((tokenizer / name).is_file() for name in ("spiece.model", "tokenizer.json"))
        if not words or not (model / "config.json").is_file():
            raise UserError(f"no T5 encoder in {folder}: want its config.json, and spiece.model or tokenizer.json")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            self.model, report = T5EncoderModel.from_pretrained(
                model, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as e:  # transformers raises a dozen kinds for files that are missing, cut or foreign
            raise UserError(f"cannot load T5 from {folder}: {str(e).splitlines()[0]}") from e
        if missing := report["missing_keys"]:  # they would be random
            raise UserError(f"cannot load T5 from {model}: {len(missing)} weights are missing, first {min(missing)}")
        self.model = self.model.to(device).eval().requires_grad_(False)
        config, self.device = self.model.config, torch.device(device)
        self.dim, self.length, self.dtype = config.d_model, length, dtype
        some = [p.flatten()[:16].bfloat16().tolist() for p in self.model.parameters()]  # alike in any precision
        self.fingerprint = _sha(["t5", config.num_heads, config.feed_forward_proj, some, length])

    @torch.no_grad()
    def encode(self, prompts):
        """list of B prompts -> float32 (B, L, D). Tokens beyond `length` are cut."""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True).input_ids
        return self.model(torch.tensor(tokens, device=self.device)).last_hidden_state.float()  # (B, L, D)


def _sha(identity):
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def load_encoder(name, dim=128, length=20, device="cpu", precision="auto"):
    """The encoder a flag names: "words", the small world's table with vectors of `dim`, or a T5 folder."""
    if name == "words":
        return WordTable(shapes.WORDS, dim, length)
    return T5(name, length, torch.bfloat16 if uses_bfloat16(precision, device) else torch.float32, device)
