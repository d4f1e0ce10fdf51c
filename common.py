"""What every script needs at its edge: flags from a dataclass, the machine it runs on, one-line errors, whole files.

A configuration is a dataclass and nothing else. Each field becomes a flag (`batch_size: int` is `--batch-size`), so
what can be set, its type and its default stand in one visible place. A user's mistake (a missing file, a wrong word)
is a `UserError`, which `run` turns into one line and exit code 2; a traceback always means a mistake of ours. Files
are written beside their place and renamed, so that whoever reads them never sees half of one.

In which precision a device computes is decided here and nowhere else: bfloat16 where there are instructions for it,
float32 elsewhere. Without them PyTorch emulates bfloat16, 20 to 170 times slower than float32.
"""

import argparse
import codecs
import contextlib
import errno
import json
import math
import os
import re
import secrets
import sys
import textwrap
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """Something the user can mend. The text is one line: what is wrong, and what to do about it."""


LIMITS = (  # flags mean the same in every script, and so does what they may be: (names, least, most)
    ("batch iterations m fake_updates save_every log_every warmup clips copies pairs lrm_updates", 1, math.inf),
    ("frames height width text_length reward_repeats truncate updates repeats every", 1, math.inf),
    (
        "threads workers global_batch fake_warmup lrm_warmup max_seconds max_evaluations sample_every",
        0,
        math.inf,
    ),
    ("reward_every prompt_count images stop_at held_out vendi_prompts fps", 0, math.inf),
    ("lr fake_lr lrm_lr beta_vsd beta_cd beta_ft beta_kl kl object_weight", 0, math.inf),
    ("reward_samples", 2, math.inf),
    ("colours", 2, 255),
    ("w w_vsd w_cd", -1, math.inf),
    ("ema drop_text", 0, 1),
    ("beta1 beta2", 0, 0.9999),
    ("clip", 1e-6, math.inf),
)


def check_flags(config):
    """UserError for a number that is not finite or beyond its LIMITS, and for a device that is not here."""
    limits = {name: limit for names, *limit in LIMITS for name in names.split()}
    for name, value in ((f.name, getattr(config, f.name)) for f in fields(config)):
        least, most = limits.get(name, (-math.inf, math.inf))
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, (int, float)) and not (least <= x <= most and math.isfinite(x)):
                what = f"at least {least}" if x < least else f"at most {most}" if x > most else "a finite number"
                raise UserError(f"--{name.replace('_', '-')}: {what}, not {x}")
    device = getattr(config, "device", "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or (device != "cpu" and not torch.cuda.is_available()):
        raise UserError(f"--device {device} cannot be used here: cpu, or on a machine with an NVIDIA GPU cuda")


def opt(default, help):
    """A dataclass field with its help text: `steps: int = opt(4, "network evaluations a video")`."""
    how = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**how, metadata={"help": help})


@dataclass
class Machine:
    """The flags of every script that computes."""

    device: str = opt("cuda" if torch.cuda.is_available() else "cpu", "The device of the networks: cpu or cuda.")
    precision: Literal["auto", "bf16", "fp32"] = opt(
        "auto", "What they compute in. auto: bfloat16 where the device has instructions for it, else float32."
    )
    threads: int = opt(
        0,
        "The CPU threads. 0: one a core. Beside another busy process one is faster than two, which would wait.",
    )


def start(machine):
    """Set this process up as the flags of a Machine say, and say in one line what it computes in and why."""
    torch.set_flush_denormal(True)  # a CPU is many times slower on numbers below 1e-38, and training makes many
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if machine.threads > cores:
        print(f"--threads {machine.threads}: there are {cores} cores, and no more threads are used")
    if machine.threads or torch.get_num_threads() > cores:
        torch.set_num_threads(min(machine.threads or cores, cores))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"computing in {in_words(machine.precision, machine.device)}, {torch.get_num_threads()} CPU threads")
    machine.precision = "bf16" if uses_bfloat16(machine.precision, machine.device) else "fp32"  # as a checkpoint says


def in_words(precision, device):
    """The precision of a device and why it is that one."""
    name = "bfloat16" if uses_bfloat16(precision, device) else "float32"
    has = "has" if has_bfloat16() else "has no"
    if precision != "auto":
        slow = device == "cpu" and name == "bfloat16" and not has_bfloat16()
        return f"{name} as --precision says" + (": slow, for this CPU has no instructions for it" if slow else "")
    return f"{name}, for this CPU {has} instructions for bfloat16" if device == "cpu" else f"{name} on {device}"


def has_bfloat16():
    """Whether this CPU has instructions for bfloat16: AVX512-BF16 or AMX (x86), BF16 (ARM)."""
    able = torch.cpu.get_capabilities()
    if able["architecture"] == "x86_64":  # PyTorch can be told to leave wider instructions alone
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return wide and (able["avx512_bf16"] or able["amx_bf16"])
    return able.get("bf16", False)


def warn_of_precision(before, now):
    """Say it where a run goes on in another precision than it began in."""
    if before != now:
        print(f"warning: computed in {before} until now, and in {now} from here: an unbroken run would differ")


def uses_bfloat16(precision, device):
    """Whether `device` computes in bfloat16. precision: "auto", "bf16" or "fp32"."""
    if precision == "auto":
        return torch.device(device).type != "cpu" or has_bfloat16()
    return precision == "bf16"


def autocast(precision, device):
    """A context in which networks compute in that precision; weights, sums and losses stay in float32."""
    if not uses_bfloat16(precision, device):
        return contextlib.nullcontext()
    # without its cache: a weight first cast where nothing needs gradients would stay without them
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(config, argv, description, presets=None):
    """Read flags into an instance of the dataclass `config`. argv None means the command line.

    Fields are int, float, str, bool (`--flag`, `--no-flag`), Literal, Optional of these (the word `none` is None), and
    list or tuple of int, float, str (`--steps 999 749` or, for numbers, `--steps 999,749`).
    `presets` maps a name to field values: those of the field `preset` replace the defaults, and explicit flags win.
    Raises UserError for an unknown flag, a value of the wrong type or beyond its limits, and a device that is not here.
    """
    hints = typing.get_type_hints(config)
    parser = _Parser(description=description, allow_abbrev=False)
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    defaults |= {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    for f in fields(config):
        text = f"{f.metadata.get('help', '')} (default: {defaults.get(f.name, 'none, required')})".replace("%", "%%")
        how = _argument(hints[f.name]) | ({"choices": list(presets)} if f.name == "preset" and presets else {})
        # SUPPRESS: only what was said on the command line comes back, so that a preset can stand below it
        how |= {"default": argparse.SUPPRESS, "required": f.name not in defaults, "help": text}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    said = vars(parser.parse_args(argv))
    preset = presets[said.get("preset", defaults["preset"])] if presets else {}
    made = config(**(defaults | preset | said))
    check_flags(made)
    return made


def _argument(hint):
    """The keywords of add_argument for one type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"type": type(args[0]), "choices": list(args)}
    if origin in (list, tuple):
        return {"action": _List, "const": hint, "nargs": "*", "metavar": args[0].__name__.upper()}
    if origin not in (typing.Union, types.UnionType):
        return {"type": hint, "metavar": hint.__name__.upper()}
    inner = _argument(next(a for a in args if a is not type(None)))  # Optional
    if "type" in inner:
        read, inner["type"] = inner["type"], lambda word: None if word.lower() == "none" else read(word)
        inner["type"].__name__ = read.__name__  # argparse names it in its error
    return inner | ({"choices": [*inner["choices"], None]} if "choices" in inner else {})


class _List(argparse.Action):
    def __call__(self, parser, namespace, words, flag=None):
        make, (kind, *more) = typing.get_origin(self.const), typing.get_args(self.const)
        if kind is not str:  # numbers may be joined by commas; in a text a comma is part of it
            words = [w for word in words for w in word.split(",") if w]
        try:
            values = make(kind(w) for w in words)
        except ValueError:
            raise argparse.ArgumentError(self, f"{' '.join(words)!r} is not a list of {kind.__name__}") from None
        if make is tuple and ... not in more and len(values) != 1 + len(more):
            raise argparse.ArgumentError(self, f"takes {1 + len(more)} values, got {len(values)}")
        setattr(namespace, self.dest, values)


def run(main):
    """Call main() and leave the process: 0, 2 with one line `error: ...` for a UserError, 130 for Ctrl-C."""
    try:
        main()
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_text(path):
    """A text file's content, UTF-8 or, where a mark at its start says so, UTF-16; the mark itself is left out.

    Raises UserError for a file that is missing and for any other encoding.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path}: it is no text in UTF-8 ({e.reason})") from e
    if "\0" in text:
        raise UserError(f"cannot read {path}: it is no text in UTF-8 (it has zero bytes)")
    return text


def read_prompts(path):
    """The lines of a text file, a prompt each; empty ones are passed over. Raises UserError as `read_text`."""
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} is empty: want a prompt a line")
    return prompts


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` (same suffix); rename it to `path` on success, remove it on failure.

    Missing folders are made. Raises UserError where nothing can be written, also on a full disk.
    """
    path = Path(path)
    # of several nodes that write the same file, two processes may have the same number
    part = path.with_name(f".{path.stem}.tmp{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    inside = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()  # find out now, not after the work
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        inside = True
        yield part
        inside = False
        os.replace(part, path)
    except OSError as e:
        if inside and e.errno not in (errno.ENOSPC, errno.EDQUOT):  # the body's own error is not ours to explain
            raise
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class _Enough(Exception):
    pass


def writable(path):
    """UserError now, not after the work, where `path` could not be written. What is there already stays."""
    with contextlib.suppress(_Enough), atomic(path):
        raise _Enough


def open_log(file, first):
    """Open a log of JSON lines to append to, without those of steps >= first, which a resumed run takes again."""
    file, kept = Path(file), []
    for line in file.read_text().splitlines() if first and file.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was being written when the run was killed
            kept += [line] if json.loads(line)["step"] < first else []
    with atomic(file) as part:
        part.write_text("".join(line + "\n" for line in kept))
    return open(file, "a")


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} and {name: anything JSON can hold} to `path`, replacing it only when all is written.

    Raises UserError where nothing can be written.
    """
    # one copy of each: the format has neither strides nor two names for one memory
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen = {}
    for name, t in whole.items():
        if seen.setdefault(t.untyped_storage().data_ptr(), name) != name and t.numel():
            whole[name] = t.clone()
    try:
        with atomic(path) as part:
            save_file(whole, part, {name: _to_text(value) for name, value in (metadata or {}).items()})
    except SafetensorError as e:
        raise UserError(f"cannot write {path}: {e}") from e


def load_tensors(path):
    """-> ({name: tensor} on the CPU, {name: value}) of a file that `save_tensors` wrote.

    Raises UserError naming the file if it is missing, cut off, or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), "pt") as f:
            metadata = {name: _from_text(text) for name, text in (f.metadata() or {}).items()}
            # copies: a mapped file would crash us if somebody wrote into it
            return {name: f.get_tensor(name).clone() for name in f.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def save_model(path, model, dtype=None, **made):
    """Write a model's weights with its class and configuration. made: further metadata, how it came to be.

    dtype: what floating-point weights are stored in (torch.float16 halves the file), None to leave them as they are.
    """
    tensors = {k: t.to(dtype or t.dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
    save_tensors(path, tensors, {"class": type(model).__name__, "config": asdict(model.config), **made})


def load_model(path, cls, device="cpu"):
    """-> (the model on `device`, in float32, for evaluation; its metadata). cls: the class the file must hold.

    Raises UserError if the file cannot be read, or holds another class, or other weights than its config asks for.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("class") != cls.__name__:
        raise UserError(f"{path} holds {metadata.get('class', 'weights of no class')}, where {cls.__name__} is needed")
    try:
        model = cls(cls.Config(**metadata["config"]))
        model.load_state_dict(tensors)
    except KeyError:
        raise UserError(f"{path} has no config in its metadata") from None
    except (RuntimeError, TypeError, ValueError) as e:  # missing, unknown or misshapen weights; unknown config fields
        said = [line.strip() for line in str(e).splitlines() if line.strip()]
        first = textwrap.shorten(said[min(1, len(said) - 1)], 160, placeholder=" ...")  # after PyTorch's own headline
        raise UserError(f"{path} does not fit this {cls.__name__}: {first}") from e
    return model.float().to(device).eval(), metadata


def read_metadata(path, name):
    """The metadata of a file of weights alone, without its tensors. name: the class it must hold. Raises UserError."""
    try:
        with safe_open(path, "pt") as f:
            found = {key: _from_text(text) for key, text in (f.metadata() or {}).items()}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e
    if found.get("class") != name:
        raise UserError(f"{path} holds {found.get('class', 'weights of no class')}, where {name} is needed")
    return found


def _to_text(value):
    """A string stays itself if it cannot be mistaken for JSON; all else is JSON."""
    return value if isinstance(value, str) and _from_text(value) is value else json.dumps(value)


def _from_text(text):
    try:
        return json.loads(text)
    except ValueError:
        return text
