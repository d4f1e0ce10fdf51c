"""What every script needs at its edge: flags from a dataclass, the machine it runs on, one-line errors, whole files.

A configuration is a dataclass and nothing else. Each field becomes a flag (`batch_size: int` is `--batch-size`), so
what can be set, its type and its default stand in one visible place. A user's mistake (a missing file, a wrong word)
is a `UserError`, which `run` turns into one line and exit code 2; a traceback always means a mistake of ours. Files
are written beside their place and renamed, so that whoever reads them never sees half of one.

In which precision a device computes is decided here and nowhere else: bfloat16 where there are instructions for it,
float32 elsewhere. Without them PyTorch emulates bfloat16, 20 to 170 times slower than float32.
"""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import re
import secrets
import shlex
import sys
import textwrap
import time
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """Something the user can mend. The text is one line: what is wrong, and what to do about it."""


# Flags mean the same in every script, and so does what they may be.
AT_LEAST = {
    1: "batch iterations m fake_updates save_every clips stills copies pairs prompts lrm_updates frames height width "
    "text_length reward_frames truncate repeats every held_out",
    0: "rank ft_share threads global_batch fake_warmup lrm_warmup sample_every "
    "reward_every images vendi_prompts fps lr fake_lr beta_vsd beta_cd beta_ft beta_kl "
    "object_weight ema fake_pull",
    2: "colours",
    3: "reward_samples",
    -1: "w w_vsd w_cd",
    1e-6: "clip",
    -(2**31): "seed",
}
AT_MOST = {1: "ema fake_pull", 255: "colours", 2**31 - 1: "seed"}


def check_flags(config):
    """UserError for a number that is not finite or beyond its limits, and for a device that is not here."""
    least, most = ({n: x for x, names in table.items() for n in names.split()} for table in (AT_LEAST, AT_MOST))
    for name, value in vars(config).items():
        low, high = least.get(name, -math.inf), most.get(name, math.inf)
        for x in value if isinstance(value, tuple) else (value,):
            wrong = ""
            if isinstance(x, float) and not math.isfinite(x):
                wrong = "a finite number"
            elif isinstance(x, (int, float)) and x < low:
                wrong = f"at least {low}"
            elif isinstance(x, (int, float)) and x > high:
                wrong = f"at most {high}"
            if wrong:
                raise UserError(f"--{name.replace('_', '-')}: {wrong}, not {x}")
    device = getattr(config, "device", "cpu")
    known = re.fullmatch(r"cpu|cuda(:(\d+))?", device)
    if not known or (device != "cpu" and int(known[2] or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {device} cannot be used here: cpu, or on a machine with an NVIDIA GPU cuda")


def opt(default, help):
    """A dataclass field with its help text: `steps: int = opt(4, "The network evaluations of a video.")`."""
    return field(default=default, metadata={"help": help})


@dataclass
class Machine:
    """The flags of every script that computes."""

    device: str = opt("cuda" if torch.cuda.is_available() else "cpu", "The device of the networks: cpu or cuda.")
    precision: Literal["auto", "bf16", "fp32"] = opt(
        "auto", "The precision of the networks. auto: bfloat16 where the device has instructions for it, else float32."
    )
    threads: int = opt(0, "The CPU threads. 0: one a core. Beside another busy process take 1.")


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
    if precision != "auto":
        slow = device == "cpu" and precision == "bf16" and not has_bfloat16()
        return f"{name} as --precision says" + (": slow, for this CPU has no instructions for it" if slow else "")
    has = "has" if has_bfloat16() else "has no"
    return f"{name}, for this CPU {has} instructions for bfloat16" if device == "cpu" else f"{name} on {device}"


def has_bfloat16():
    """Whether this CPU has instructions for bfloat16: AVX512-BF16 or AMX (x86), BF16 (ARM)."""
    able = torch.cpu.get_capabilities()
    if able["architecture"] == "x86_64":  # PyTorch can be told to leave wider instructions alone
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return wide and (able["avx512_bf16"] or able["amx_bf16"])
    return able.get("bf16", False)


def uses_bfloat16(precision, device):
    """Whether `device` computes in bfloat16. precision: "auto", "bf16" or "fp32"."""
    if precision == "auto":
        kind = torch.device(device).type
        return has_bfloat16() if kind == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
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
    """Read flags into the dataclass `config`, whose fields all have defaults. argv None: the command line.

    Fields are int, float, str, bool (`--flag`, `--no-flag`), Literal, one of these or None, and tuple[..., ...] of int,
    float, str (`--steps 999 749` or `--steps 999,749`; said again, a flag adds to them). `presets` maps a name to field
    values: those of the field `preset` replace the defaults, and explicit flags win. --help shows the description and
    the defaults of the preset that is the default.
    Raises UserError for an unknown flag, a value of the wrong type or beyond its limits, and a device that is not here.
    """
    hints = typing.get_type_hints(config)
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=layout, allow_abbrev=False)
    usual = presets[config.preset] if presets else {}
    for f in fields(config):
        default = usual.get(f.name, f.default)
        text = f"{f.metadata.get('help', '')} (default: {default})".replace("%", "%%")
        how = _argument(hints[f.name]) | ({"choices": list(presets)} if f.name == "preset" and presets else {})
        # SUPPRESS: only what was said on the command line comes back, so that a preset can stand below it
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    said = vars(parser.parse_args(argv))
    said |= {name: tuple(itertools.chain(*x)) for name, x in said.items() if isinstance(x, list)}
    preset = presets[said.get("preset", config.preset)] if presets else {}
    made = config(**(preset | said))
    check_flags(made)
    return made


def _argument(hint):
    """The keywords of add_argument for one type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"type": type(args[0]), "choices": list(args)}
    if origin is tuple:

        def numbers(word):  # also joined by commas; in a text a comma is part of it
            return [word] if args[0] is str else [args[0](x) for x in word.split(",")]

        return {"type": numbers, "nargs": "+", "action": "extend", "metavar": args[0].__name__.upper()}
    if origin in (typing.Union, types.UnionType):
        return _argument(args[0])
    return {"type": hint, "metavar": hint.__name__.upper()}


def run(main):
    """Call main() and leave the process: 0, 2 with one line `error: ...` for a UserError, 130 for Ctrl-C, 1 where
    nobody reads what is printed."""
    try:
        main()
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `| head`; what is left unsaid goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def read_text(path):
    """A text file's content, without the mark that some write at its start. Raises UserError for what is not UTF-8."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path}: it is no text in UTF-8 ({e.reason})") from e
    if "\0" in text:
        raise UserError(f"cannot read {path}: it is no text in UTF-8 (it has zero bytes)")
    return text


def read_json(path):
    """What a file of JSON holds. Raises UserError as `read_text`, and for what is no JSON."""
    try:
        return json.loads(read_text(path))
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from e


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
        usual, inside = part.stat().st_mode, True
        yield part
        inside = False
        part.chmod(usual)  # safetensors would keep others from reading
        os.replace(part, path)
    except OSError as e:
        if inside and e.errno not in (errno.ENOSPC, errno.EDQUOT):  # the body's own error is not ours to explain
            raise
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def claimed(folder):
    """A context in which no other run writes into a folder. UserError where one does, or nothing can be written."""
    import fcntl  # here, since Windows has none, and can draw

    writable(Path(folder) / "log.jsonl")
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing into {folder}: name another --out") from None
        yield
    finally:
        os.close(place)


def check_spared(file, *inputs):
    """UserError where a run would write its result, `file`, over one of its inputs (paths, or empty)."""
    for path in inputs:
        if path and Path(path).resolve() == Path(file).resolve():
            raise UserError(f"{path} would be written over by the result: name another --out")


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


def write_json(file, result):
    """A dictionary as JSON, a line a key, and of "rows" a line a row: good in a diff."""
    rows = lambda value: "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    lines = [f' "{k}": {rows(v) if k == "rows" else json.dumps(v)}' for k, v in result.items()]
    with atomic(file) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def tidy(value):
    """Floats to 5 significant digits, NaN to None: small files, valid JSON."""
    if isinstance(value, dict):
        return {k: tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} and {name: anything JSON can hold} to `path`, replacing it only when all is written.

    Raises UserError where nothing can be written.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}  # the format has no strides
    try:
        with atomic(path) as part:
            save_file(tensors, part, {name: _to_text(value) for name, value in (metadata or {}).items()})
    except SafetensorError as e:
        raise UserError(f"cannot write {path}: {e}") from e


@contextlib.contextmanager
def open_tensors(path):
    """Yield (an open safetensors file, its metadata {name: value}).

    Raises UserError naming the file if it is missing, a folder, cut off, or no safetensors file.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, where a .safetensors file is wanted")
    try:
        with safe_open(os.fspath(path), "pt") as f:
            yield f, {name: _from_text(text) for name, text in (f.metadata() or {}).items()}
    except FileNotFoundError:
        hint = ": the bundled ones are found from the repository's folder" * (Path(path).parts[:1] == ("weights",))
        raise UserError(f"there is no file {path}{hint}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def load_tensors(path):
    """-> ({name: tensor} on the CPU, {name: value}) of a file that `save_tensors` wrote. Raises as `open_tensors`."""
    with open_tensors(path) as (f, metadata):
        # copies: a mapped file would crash us if somebody wrote into it
        return {name: f.get_tensor(name).clone() for name in f.keys()}, metadata  # noqa: SIM118


def save_model(path, model, dtype=None, **made):
    """Write a model's weights with its class and configuration. made: further metadata, how it came to be.

    dtype: what floating-point weights are stored in (torch.float16 halves the file), None to leave them as they are.
    """
    tensors = {k: t.to(dtype or t.dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{path} is not written, for its weights are not finite: train again with a lower --lr")
    save_tensors(path, tensors, {"class": type(model).__name__, "config": asdict(model.config), **made})


def made_by(settings):
    """What a file of weights or a result says of how it was made: the command, the date, and its flags, `settings`."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", f"--nproc_per_node={ranks}"]
    command = shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "settings": settings}


def load_model(path, cls, device="cpu"):
    """-> (the model on `device`, in float32, for evaluation; its metadata). cls: the class the file must hold.

    Raises UserError if the file cannot be read, or holds another class, or other weights than its config asks for.
    """
    metadata, (tensors, _) = read_metadata(path, cls.__name__), load_tensors(path)
    config = config_of(path, metadata, cls)
    try:
        model = cls(config)
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as e:  # missing, unknown or misshapen weights
        said = [line.strip() for line in str(e).splitlines() if line.strip()]
        first = textwrap.shorten(said[min(1, len(said) - 1)], 160, placeholder=" ...")  # after PyTorch's own headline
        raise UserError(f"{path} does not fit this {cls.__name__}: {first}") from e
    return model.float().to(device).eval(), metadata


def read_metadata(path, name):
    """The metadata of a file of weights alone, without its tensors. name: the class it must hold. Raises UserError."""
    with open_tensors(path) as (_, found):
        pass
    if (there := found.get("class", "weights of no class")) != name:
        hint = "; adapters (Adapted) are for sample.py --adapter and train.py --rank" * ("Adapted" in (there, name))
        raise UserError(f"{path} holds {there}, where {name} is needed{hint}")
    return found


def config_of(path, metadata, cls):
    """The cls.Config that a file's metadata has. UserError where they have none, or one that is not known here."""
    try:
        return cls.Config(**metadata["config"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} has no config of this {cls.__name__} in its metadata ({e})") from e


def _to_text(value):
    """A string stays itself if it cannot be mistaken for JSON; all else is JSON."""
    return value if isinstance(value, str) and _from_text(value) is value else json.dumps(value)


def _from_text(text):
    try:
        return json.loads(text)
    except ValueError:
        return text
