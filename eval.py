"""How good is it? Measurements of models, and the tables made of them.

    python eval.py compare --out FILE.gif                    # teacher and student side by side
    python eval.py world --weights W --steps 4 2 1           # accuracy, Frechet distance, coverage, diversity
    python eval.py world --reference                         # the same of rendered clips and the VAE's copies of them
    python eval.py time --weights W --teacher T              # Table 4; memory: the same for peak memory
    python eval.py reward-memory                             # of latent and pixel rewards, Tables 1 and 10
    python eval.py videos --weights W --out DIR              # VBench's 6,220 videos; torchrun shares them out
    python eval.py vbench --videos DIR --results DIR         # VBench's sixteen dimensions and totals
    python eval.py vendi --videos DIR --inception FILE       # diversity of video files (Eq. 17, Table 3)
    python eval.py people --a DIR --b DIR --out PAGE.html    # pairs of videos for people to compare (section 8.1)
    python eval.py votes FILES...                            # what they said (Fig. 6)
    python eval.py experiments NAME ...                      # the runs behind the tables: evals/experiments.py
    python eval.py sheet TABLE --out FILE.png                # what the students of such a table draw
    python eval.py curves TABLE --out FILE.png               # what was logged of them
    python eval.py tables                                    # results/*.json into the tables of README.md and docs/

--out NAME.json keeps a measurement (evals/tables.py), every score with its sampling error. Each command has --help.
"""

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import rewards
from common import Machine, UserError, opt, parse, run, start, writable
from dit import PRESETS as SIZES
from evals import cost, experiments, people, pictures, tables, vbench
from evals.metrics import Inception, diversity_of_folder, pixel_features, vendi, vendi_kernel
from evals.vbench import vbench_scores
from generate import BUNDLED, Generator
from text import WordTable
from video import write_video_grid
from world import shapes
from world.reading import Evaluator, model_rows, reference_rows
from world.shapes import held_out

__all__ = ["vbench_scores", "vendi", "vendi_kernel"]  # the names under which others look for them


@dataclass
class Config(Machine):
    out: str = opt("", "The place to write to: NAME.json for a measurement, else a file or folder.")
    seed: int = opt(0, "The seed of all noise.")


@dataclass
class ModelConfig(Config):
    weights: str = opt(str(BUNDLED / "student.safetensors"), "The weights: a .safetensors file, or a CogVideoX folder.")
    adapter: str = opt("", "A student's adapters on these weights, as train.py --rank writes them.")
    vae: str = opt("", "The VAE, file or folder. Empty: the bundled one, or the one in the weights' folder.")
    text: str = opt("", "The folder of a T5 encoder. Empty: the world's words, or the one in the weights' folder.")
    w: float | None = opt(None, "The guidance of a teacher (Eq. 9). None: what its weights say.")
    label: str = opt("", "The name in tables. Empty: the file's.")
    batch: int = opt(64, "The number of videos drawn at a time.")

    def load(self, teacher=""):
        """The model to measure, or a teacher to compare it with."""
        weights, adapter = (teacher, "") if teacher else (self.weights, self.adapter)
        return Generator.load(weights, self.vae, self.device, self.text, self.precision, adapter)

    def name(self):
        return self.label or Path(self.weights).stem


# ---------------------------------------------------------------------------------------------------------------------
# the small world


@dataclass
class WorldConfig(ModelConfig):
    judge: str = opt(str(BUNDLED / "judge.safetensors"), "The judge that evaluates, never the one that rewards.")
    steps: tuple[int, ...] = opt((4,), "The numbers of steps, all on the same prompts and noise.")
    prompts: int = opt(2000, "The number of held-out prompts.")
    captions: Literal["train", "long", "short", "object"] = opt(
        "train",
        "The kind of prompts. They name: a few factors, all, the objects and what they do, or one object alone.",
    )
    vendi_prompts: int = opt(100, "The number of prompts drawn with 5 seeds each, for diversity. 0: none.")
    reference: bool = opt(False, "Other rendered clips of the same prompts, and the VAE's copies, instead of a model.")
    dimensions: bool = opt(False, "VBench's sixteen dimensions are measured too.")
    rewards: tuple[str, ...] = opt((), "The rewards that are measured too, with the bundled weights.")


def world(cfg):
    """Accuracy, Frechet distance, precision, coverage and diversity of a model, or of the world itself."""
    if cfg.prompts < 20:
        raise UserError(f"--prompts {cfg.prompts} is too few to say anything: at least 20")
    generator = None if cfg.reference else cfg.load()
    if generator and tuple(generator.shape[1:]) != tuple(SIZES["shapes"].latents):
        raise UserError(f"the judge reads clips of the small world; {cfg.weights} draws others")
    for steps in [] if cfg.reference else cfg.steps:
        generator.steps(steps)  # refuse before the work, not after it
    for name in cfg.rewards:
        rewards.make(name)
    evaluator = Evaluator(cfg.judge, cfg.device, cfg.batch, cfg.precision)
    clips, prompts, named = held_out(cfg.prompts, style=cfg.captions)
    reference = evaluator.read(clips, shapes.render_batch, "reference")
    if cfg.reference:
        rows = reference_rows(cfg, evaluator, reference["features"], clips, prompts, named)
    else:
        rows = model_rows(cfg, cfg.name(), evaluator, reference["features"], generator, prompts, named)
    model = {k: generator.about.get(k) for k in ("kind", "timesteps", "command", "date")} if generator else None
    result = tables.show(cfg, "world", rows=rows, judge=evaluator.about.get("results"), model=model)
    if cfg.dimensions:
        print(tables.table([result], "dimensions"))


@dataclass
class CostConfig(ModelConfig):
    teacher: str = opt(str(BUNDLED / "teacher.safetensors"), "The teacher to compare with. none: no teacher.")
    teacher_steps: int = opt(50, "The teacher's steps.")
    steps: tuple[int, ...] = opt((4, 2, 1), "The student's steps.")
    repeats: int = opt(100, "The most times that each is timed.")
    seconds: float = opt(300.0, "The seconds after which no further round begins.")
    prompt: str = opt("a red star springs at night", "The prompt.")


def models(cfg):
    """[(label, generator, steps, w)]: the teacher first, then the student at each of its numbers of steps."""
    student = cfg.load()
    pairs = [(cfg.label or "student", student, n, cfg.w) for n in cfg.steps]
    for n in cfg.steps:
        student.steps(n)
    if cfg.teacher.lower() == "none":
        return pairs
    if (teacher := cfg.load(cfg.teacher)).student:
        raise UserError(f"--teacher {cfg.teacher} says that it is a student")
    return [("teacher", teacher, cfg.teacher_steps, cfg.w), *pairs]


def time_(cfg):
    """Table 4: time of text encoding, diffusion and decoding, as per cent of the teacher's total."""
    rows = cost.times(models(cfg), cfg.prompt, cfg.repeats, cfg.seconds)
    return tables.show(cfg, "time", rows=rows, device=device_name(cfg.device))


def memory(cfg):
    """Peak memory of each phase."""
    return tables.show(cfg, "memory", rows=cost.memory(models(cfg), cfg.prompt), device=device_name(cfg.device))


@dataclass
class RewardMemoryConfig(Config):
    frames: tuple[int, ...] = opt((1, 12, 24, 64, 128), "The numbers of frames of 192x320.")
    clip: str = opt("ViT-H-14", "The pixel reward's network, by open_clip's name.")


def reward_memory(cfg):
    """Tables 1 and 10: peak memory of latent and pixel rewards, forward and backward; counted where there is no GPU."""
    gpu = torch.device(cfg.device).type == "cuda"
    rows = cost.reward_memory(cfg.device if gpu else "meta", cfg.frames, cfg.clip)
    device = device_name(cfg.device) if gpu else "counted"
    return tables.show(cfg, "reward_memory", rows=rows, device=device)


def device_name(device):
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# VBench, and the diversity of video files


@dataclass
class VideosConfig(ModelConfig):
    prompts: str = opt("", "The prompts: VBench_full_info.json or a text file. Empty: the installed package's.")
    long: str = opt("", "A text file with the long prompt of each prompt, in the same order.")
    copies: int = opt(5, "The videos a prompt, each of its own seed. Temporal flickering takes five times as many.")
    steps: int = opt(4, "The steps of a video.")
    fps: float = opt(0.0, "The frame rate in the files, on which dynamic degree depends. 0: the model's own.")
    batch: int = opt(8, "The number of videos drawn at a time.")


# what must not change while a folder of videos is being filled
VIDEOS_BY = ("weights", "adapter", "vae", "text", "w", "steps", "prompts", "long", "copies", "seed")


def videos(cfg):
    """Draw what VBench wants, under its names. What is there already is kept, so a killed run just starts again."""
    if not cfg.out:
        raise UserError("name the folder of the videos with --out")
    entries = vbench.suite(cfg.prompts, cfg.long)
    jobs, out = vbench.plan(entries, cfg.copies, cfg.seed), Path(cfg.out)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.device(cfg.device).type == "cuda" and size > 1:
        cfg = replace(cfg, device=f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
    generator = cfg.load()
    generator.steps(cfg.steps)
    for entry in entries if isinstance(generator.encoder, WordTable) else []:
        generator.encoder.encode([entry["prompt"]])  # an unknown word is found now, not in the middle
    fps = cfg.fps or generator.about.get("fps", shapes.FPS)

    made = {k: v for k, v in asdict(cfg).items() if k in VIDEOS_BY}
    vbench.begin(out, made | {"fps": fps, "entries": entries, "videos": jobs})
    mine, broken = vbench.missing(jobs[rank::size], out)
    done = len(jobs[rank::size]) - len(mine)
    print(f"{len(jobs)} videos of {len(entries)} prompts; {len(mine)} to draw here, {done} there, {broken} broken")
    vbench.draw(generator, mine, out, cfg.steps, cfg.w, fps, cfg.batch, quiet=rank > 0)


@dataclass
class VBenchConfig(Config):
    videos: str = opt("", "The folder that `videos` filled. Empty: results are only read.")
    results: str = opt("evaluation_results", "The folder of the package's *_eval_results.json, read and written.")
    prompts: str = opt("", "The prompts: VBench_full_info.json. Empty: the installed package's.")
    dimensions: tuple[str, ...] = opt(tuple(vbench.key(d) for d in vbench.DIMENSIONS), "The dimensions to compute.")


def score_videos(cfg):
    """Quality, Semantic and Total from the package's results; dimensions that have none yet are computed by it."""
    if unknown := set(cfg.dimensions) - {vbench.key(d) for d in vbench.DIMENSIONS}:
        raise UserError(f"--dimensions: VBench has no {', '.join(sorted(unknown))}")
    scores, complaints = vbench.read_package_results(cfg.results)
    missing = [d for d in vbench.DIMENSIONS if d not in scores and vbench.key(d) in cfg.dimensions]
    if cfg.videos and missing:
        plan, info = Path(cfg.videos) / "videos.json", cfg.prompts or vbench.full_info()
        made = vbench.read_plan(plan) if plan.exists() else {"entries": vbench.suite(info), "copies": 5}
        for dimension in missing:
            try:
                left_out = vbench.run_package(cfg.videos, made, dimension, info, cfg.results, cfg.device)
                complaints += [f"{dimension}: {name} is missing or broken and left out" for name in left_out]
            except UserError as e:
                complaints.append(str(e))
        scores, more = vbench.read_package_results(cfg.results)
        complaints += more
    for complaint in dict.fromkeys(complaints):
        print(complaint, file=sys.stderr)
    if not scores:
        raise UserError(f"{cfg.results} has no result of vbench, and --videos gave none")
    return tables.show(cfg, "vbench", scores=scores, complaints=complaints)


@dataclass
class VendiConfig(Config):
    videos: str = opt("", "The folder of videos, named PROMPT-0.mp4 to PROMPT-4.mp4.")
    inception: str = opt("", "The file inception_v3_google-0cc3c7bd.pth of torchvision. Empty: pixels alone.")
    every: int = opt(20, "The frames from one key frame to the next.")
    copies: int = opt(5, "The videos of a prompt.")
    prompts: int = opt(500, "The most prompts, drawn at random.")
    label: str = opt("", "The name in tables. Empty: the folder's.")


def diversity_of_files(cfg):
    """Vendi diversity of video files (Eq. 17): mean and standard deviation over prompts."""
    if not cfg.videos or not Path(cfg.videos).is_dir():
        raise UserError(f"--videos {cfg.videos or '(nothing)'} is no folder")
    kinds = {"pixel": pixel_features} | ({"inception": Inception(cfg.inception, cfg.device)} if cfg.inception else {})
    scores, left_out = diversity_of_folder(cfg.videos, kinds, cfg.copies, cfg.every, cfg.prompts, cfg.seed)
    row = {"label": cfg.label or Path(cfg.videos).name, "prompts": len(scores["pixel"]), "left out": left_out}
    return tables.show(cfg, "vendi", rows=[row | {kind: cost.spread(values) for kind, values in scores.items()}])


# ---------------------------------------------------------------------------------------------------------------------
# people


@dataclass
class PeopleConfig(Config):
    out: str = opt("people.html", "The page, FILE.html.")
    a: str = opt("", "A folder of videos, whose name stands in the votes.")
    b: str = opt("", "A second folder, with videos of the same names.")
    pairs: int = opt(50, "The most pairs, drawn at random.")


def people_(cfg):
    """One page on which a person compares the videos of two folders, pair by pair."""
    if not cfg.a or not cfg.b:
        raise UserError("name the two folders of videos with --a and --b")
    out = Path(cfg.out)
    n, left_out = people.make_page(cfg.a, cfg.b, out, cfg.pairs, cfg.seed)
    for why in left_out[:20]:
        print(f"left out: {why}", file=sys.stderr)
    print(
        f"wrote {out}: {n} pairs, {out.stat().st_size / 1e6:.1f} MB"
        + (f"; {len(left_out)} left out" if left_out else "")
    )


@dataclass
class VotesConfig(Config):
    files: tuple[str, ...] = opt((), "The files that the page saved. The flag may be left out.")


def votes(cfg):
    """Win rates without ties, per question and rater."""
    return tables.show(cfg, "votes", rows=people.count(people.read_votes(cfg.files)))


# ---------------------------------------------------------------------------------------------------------------------
# side by side


@dataclass
class CompareConfig(ModelConfig):
    out: str = opt("samples/compare.gif", "The moving sheet, FILE.gif or FILE.mp4.")
    teacher: str = opt(str(BUNDLED / "teacher.safetensors"), "The teacher to compare with.")
    teacher_steps: tuple[int, ...] = opt((50, 4, 1), "The teacher's steps.")
    steps: tuple[int, ...] = opt((4, 1), "The student's steps.")
    prompts: int = opt(3, "The number of held-out prompts, from the first on.")
    captions: Literal["train", "long", "short", "object"] = opt("train", "The kind of prompts, as in `world`.")
    every: int = opt(1, "Every so many frames one is shown.")
    colours: int = opt(255, "The colours of each frame of a .gif. Fewer make a smaller file.")


def compare(cfg):
    """The same prompts and noise by the teacher and by the student, side by side."""
    teacher, student = cfg.load(cfg.teacher), cfg.load()
    models = [("teacher", teacher, n) for n in cfg.teacher_steps] + [("student", student, n) for n in cfg.steps]
    for _, generator, n in models:
        generator.steps(n)
    words = held_out(cfg.prompts, style=cfg.captions)[1]
    columns = []
    for _, generator, n in models:
        columns.append(generator.draw(words, range(cfg.seed, cfg.seed + cfg.prompts), n, cfg.w))
    titles = [f"{name}, {n} step{'s' * (n > 1)}" for name, _, n in models]
    fps = models[-1][1].about.get("fps", shapes.FPS)
    rows = [[video[:, :: cfg.every] for video in row] for row in zip(*columns)]
    write_video_grid(cfg.out, rows, fps / cfg.every, words, titles, cfg.colours)
    print(f"wrote {cfg.out}: {'; '.join(titles)}")


@dataclass
class ExperimentsConfig:
    names: tuple[str, ...] = opt(
        (), "The tables or rows to make, or all. None: the list of them, and what has run. The flag may be left out."
    )
    budget: float = opt(0.0, "The hours after which no further run begins. 0: no limit.")


def run_experiments(cfg):
    """Make the runs of evals/experiments.py that are missing, and measure them."""
    if not Path("evals/experiments.py").exists():
        raise UserError("run this in the repository's folder, whose results/ it goes on with")
    if not cfg.names:
        return print(*experiments.listing(), sep="\n")
    experiments.run(cfg.names, cfg.budget)


@dataclass
class CurvesConfig:
    table: str = opt("tuning", "The table of evals/experiments.py. The flag may be left out.")
    numbers: tuple[str, ...] = opt(
        ("true_reward", "lrm_estimate", "rank_correlation"), "The numbers of the log, a panel each."
    )
    out: str = opt("samples/curves.png", "The picture, FILE.png.")


def curves(cfg):
    """What the runs of a table have logged, from results/ alone (the paper's Fig. 8-11)."""
    pictures.curves(cfg.table, cfg.out, cfg.numbers)


@dataclass
class SheetConfig:
    table: str = opt("tuning", "The table, whose runs are in runs/experiments. The flag may be left out.")
    prompts: int = opt(4, "The number of held-out prompts, from the first on.")
    out: str = opt("samples/sheet.png", "The picture, FILE.png.")


def sheet(cfg):
    """What the students of a table draw: three frames of the same prompts from the same noise."""
    pictures.sheet(cfg.table, cfg.out, cfg.prompts)


@dataclass
class TablesConfig:
    pass


def write_tables(cfg):
    """results/*.json into the tables of README.md and docs/."""
    print(*(f"wrote {path}" for path in tables.write_pages()), sep="\n")


COMMANDS = {
    "tables": (TablesConfig, write_tables),
    "experiments": (ExperimentsConfig, run_experiments),
    "world": (WorldConfig, world),
    "time": (CostConfig, time_), "memory": (CostConfig, memory),
    "reward-memory": (RewardMemoryConfig, reward_memory),
    "videos": (VideosConfig, videos),
    "vbench": (VBenchConfig, score_videos), "vendi": (VendiConfig, diversity_of_files),
    "people": (PeopleConfig, people_),
    "votes": (VotesConfig, votes), "curves": (CurvesConfig, curves),
    "compare": (CompareConfig, compare), "sheet": (SheetConfig, sheet),
}  # fmt: skip

KEPT_AS = dict.fromkeys(("world", "time", "memory", "reward-memory", "vbench", "vendi", "votes"), (".json",))
KEPT_AS |= {"people": (".html",), "curves": (".png",), "sheet": (".png",), "compare": (".gif", ".mp4")}
# what words without a flag are
POSITIONAL = {"experiments": "--names", "votes": "--files", "curves": "--table", "sheet": "--table"}


def main():
    words = sys.argv[1:]
    command = words.pop(0) if words else ""
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        config, work = COMMANDS[command]
        if command in POSITIONAL and words and not words[0].startswith("-"):
            words = [POSITIONAL[command], *words]
        cfg = parse(config, words, work.__doc__)
        if isinstance(cfg, Machine):
            start(cfg)
        if command in KEPT_AS and cfg.out:  # find out now, not after the work
            if Path(cfg.out).suffix not in KEPT_AS[command]:
                raise UserError(f"--out {cfg.out}: want a file NAME{' or NAME'.join(KEPT_AS[command])}")
            writable(cfg.out)
        work(cfg)
    else:
        raise UserError(f"unknown command {command!r}: one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    run(main)
