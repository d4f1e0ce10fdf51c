"""The paper's tables asked again in the small world: named runs, and one command that makes them.

    python eval.py experiments                            # the names, and which of their seeds have run
    python eval.py experiments ablation                   # all rows of a table; "ablation/VSD" is one of them
    python eval.py experiments all --budget 8             # what is missing, for 8 hours; begun again it goes on

A row is a label and the flags that make it; everything else is BASE and SHORT below and the default of train.py. Each
runs with SEEDS, for the same number of updates (but `updates`, and the short teachers of `velocity`), its last weights
are measured on the same prompts and the same noise, and results/ keeps one small file a run. Rows of the same flags
share their runs. All compute in float32 on one thread, so that a machine with instructions for bfloat16 repeats what
one without them has found, and two tables can be made side by side on two cores. A stopped training goes on where it
was. `eval.py tables` then writes docs/RESULTS.md.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import common
from common import UserError, read_json
from evals.metrics import mean_error, pm
from world.reading import MAIN

SEEDS, ALL = (0, 1, 2), ("4", "2", "1")
MEASURE = "--prompts 256 --vendi-prompts 16 --rewards agreement object_kept jpeg_compressibility"
EQUAL = "--precision fp32 --threads 1"
SHORT = "--batch 8 --global-batch 8 --iterations 100"  # half the default run's batch, and three quarters of its updates
BASE = "--cd-target ema --w-vsd 2"  # what rows change one thing of; the defaults are what they have shown to be better
TUNE = "--student weights/student.safetensors --cd-target teacher --w-vsd 1"  # the rewards' rows begin with the same
TUNE += " --reward-every 25"  # student, and go on as it was made
HOLD = "--beta-vsd 0 --beta-cd 0 --beta-kl 10"  # and are held by VSD + CD, or by this distance to it
TEACHER = "eval.py --weights weights/teacher.safetensors --steps 50"  # measured as it is
STUDENT = "eval.py --weights weights/student.safetensors --steps 4"
UNGUIDED = "--w-vsd 0 --w-cd 0"
READING = f"{UNGUIDED} --reward agreement"
POLICY = "ddpo.py --lr 1e-4 --beta-kl 10 --reward object_kept"  # at the rate of the others
BRIEF = "--iterations 800 --images 400 --clips 4000 --stills 8000"  # of teachers: the bundled one had 19,500 steps

# table -> {label: flags of train.py, or a script and its flags}
TABLES = {
    "ablation": {  # Table 3, and who gives CD's target (Eq. 6)
        "VSD + CD": "",
        "VSD": "--beta-cd 0",
        "CD, from its average": "--beta-vsd 0",
        "CD, from the student": "--beta-vsd 0 --cd-target student",
        "CD, from the teacher": "--beta-vsd 0 --cd-target teacher",
        "VSD + CD, from the teacher": "--cd-target teacher",
        "VSD + LRM": "--beta-cd 0 --reward object_kept",
        "VSD + CD + LRM": "--reward object_kept",
        "teacher": f"{TEACHER} 4 2 1",
    },
    "tuning": {  # Table 5
        "the student": STUDENT,
        "VSD + CD": TUNE,
        "VSD + CD + LRM, scalar": f"{TUNE} --reward object_kept --lrm-labels scalar",
        "VSD + CD + LRM, parts": f"{TUNE} --reward object_kept --lrm-labels parts",
        "VSD + CD + LRM, scalar, pulling 10 times": f"{TUNE} --reward object_kept --lrm-labels scalar --ft-share 10",
        "KL + LRM, scalar": f"{TUNE} {HOLD} --reward object_kept --lrm-labels scalar",
        "KL + LRM, parts": f"{TUNE} {HOLD} --reward object_kept --lrm-labels parts",
        "KL + DDPO": POLICY,
        "KL + DDPO, raw": f"{POLICY} --advantage raw",
        "KL + ReFL": f"{POLICY} --method refl",
        "KL + DRaFT-1": f"{POLICY} --method draft --truncate 1",
    },
    "rewards": {  # of what is in every patch, and of motion
        "VSD + CD": "",
        "JPEG compressibility": "--reward jpeg_compressibility",
        "dynamic degree": "--reward dynamic_degree",
        "dynamic degree, LRM of 3D convolutions": "--reward dynamic_degree --lrm-backbone 3d",
    },
    "agreement": {  # a reward that reads the prompt, where something is left to gain: distilled without guidance
        "VSD + CD": UNGUIDED,
        "VSD + CD + LRM, scalar, pulling 0.3 times": f"{READING} --lrm-labels scalar --ft-share 0.3",
        "VSD + CD + LRM, scalar, pulling 3 times": f"{READING} --lrm-labels scalar --ft-share 3",
        "VSD + CD + LRM, parts, pulling 0.3 times": f"{READING} --lrm-labels parts --ft-share 0.3",
        "VSD + CD + LRM, parts, pulling as VSD does": f"{READING} --lrm-labels parts --ft-share 1",
        "VSD + CD + LRM, parts, pulling 3 times": f"{READING} --lrm-labels parts --ft-share 3",
    },
    "steps": {  # Table 6
        "4 steps, VSD + CD": "",
        "4 steps, VSD": "--beta-cd 0",
        "2 steps, VSD + CD": "--steps 2",
        "2 steps, VSD": "--steps 2 --beta-cd 0",
        "1 step, VSD + CD": "--steps 1",
        "1 step, VSD": "--steps 1 --beta-cd 0",
    },
    "teacher-steps": {"m = 1": "--m 1", "m = 2": "--m 2", "m = 5": "", "m = 10": "--m 10"},  # Table 7
    "prediction": {"conjugate": "", "sample": "--prediction sample"},  # Table 8
    "length": {  # Table 9: prompts that name one object, a few things, all
        "teacher, object": f"{TEACHER} --captions object",
        "student, object": f"{STUDENT} --captions object",
        "teacher, short": f"{TEACHER} --captions short",
        "student, short": f"{STUDENT} --captions short",
        "teacher, long": f"{TEACHER} --captions long",
        "student, long": f"{STUDENT} --captions long",
    },
    "velocity": {  # section 3.1: which of them is learned most easily; teachers, in 50 steps
        name: f"pretrain.py teacher --prediction {name} {BRIEF}" for name in ("conjugate", "velocity", "epsilon")
    },
    "rank": {"full": ""}
    | {f"rank {r}": f"--rank {r}" for r in (8, 16, 32, 64)}
    | {
        "rank 16, a third of the rates": "--rank 16 --lr 3e-4 --fake-lr 6e-4",
        "rank 16, three times the rates": "--rank 16 --lr 3e-3 --fake-lr 6e-3",
    },
    "choices": {  # what the paper leaves open, one at a time
        "as it is": "",
        "1 fake update": "--fake-updates 1",
        "5 fake updates": "--fake-updates 5",
        "fake score pulled to the student": "--fake-pull 0.03",  # LightX2V's
        "renoised between steps": "--transition renoise",
        "noised data": "--generator-input data",
        "the KL's own weight": "--vsd-weight score",
        "guidance of 1": "--w-vsd 1",
        "four times the CD": "--beta-cd 2",
        "guidance of 1, CD from the teacher": "--w-vsd 1 --cd-target teacher",  # the default
    },
    "updates": {  # a healthy run, as it goes on
        "1 update": "--iterations 1",
        "25 updates": "--iterations 25",
        "50 updates": "--iterations 50",
        "100 updates": "",
        "200 updates": "--iterations 200",
    },
    "troubles": {  # each brought about on purpose: docs/TROUBLESHOOTING.md
        "healthy": "",
        "student too fast": "--beta-cd 0 --lr 1e-3 --fake-updates 1",
        "fake score too slow": "--fake-lr 1e-6",
        "no VSD": "--beta-vsd 0",
        "guidance of 10": "--w-vsd 10",
        "guidance off by one": "--w-vsd 3 --w-cd 3",
        "all for motion": "--reward dynamic_degree --ft-share 4",
        "all for small files": "--reward jpeg_compressibility --ft-share 4",
        "a reward too strong": "--reward object_kept --lrm-labels scalar --lrm-warmup 0 --ft-share 0 --beta-ft 10",
        "average that stands": "--ema 0.9999",
    },
    "overoptimised": {  # Fig. 9, 14
        "the student": STUDENT,
        "LRM alone": f"{TUNE} --beta-vsd 0 --beta-cd 0 --reward jpeg_compressibility",
        "LRM and KL": f"{TUNE} {HOLD} --reward jpeg_compressibility",
        "LRM of motion alone": f"{TUNE} --beta-vsd 0 --beta-cd 0 --reward dynamic_degree",
        "LRM of motion and KL": f"{TUNE} {HOLD} --reward dynamic_degree",
    },
}


# of which reward a table shows what was measured
REWARDS = {"tuning": "object_kept", "agreement": "agreement"}
REWARDS |= dict.fromkeys(("rewards", "overoptimised"), "jpeg_compressibility")


def rows(table):
    """{label: flags} of a table. UserError where there is none of that name."""
    if table not in TABLES:
        raise UserError(f"there is no table {table}; there are: {', '.join(TABLES)}")
    return TABLES[table]


ROWS = [(table, label) for table, labels in TABLES.items() for label in labels]


def first_of(table, label):
    """Rows of the same flags are one run: (table, label) of the first of them."""
    return next(row for row in ROWS if TABLES[row[0]][row[1]] == TABLES[table][label])


def name_of(table, label, seed):
    """Of a run, after its first row."""
    table, label = first_of(table, label)
    words = "".join(c if c.isalnum() else "-" for c in label.lower())
    return f"{table}-{words}-{seed}"


def file_of(table, label, seed):
    """Where results/ keeps it."""
    return Path("results") / f"experiment-{name_of(table, label, seed)}.json"


def weights_of(table, label):
    """The weights of a row's first seed: bundled ones where nothing is trained."""
    flags = TABLES[table][label].split()
    if flags[:1] == ["eval.py"]:
        return Path(flags[flags.index("--weights") + 1])
    who = "teacher" if flags[:1] == ["pretrain.py"] else "student"
    return Path("runs/experiments") / name_of(table, label, 0) / f"{who}.safetensors"


def chosen(names):
    """[(table, label, seed), ...] of names: "all", a table, or table/label; first seeds first. Raises UserError."""
    means = lambda name, row: name in ("all", row[0], "/".join(row))
    wanted = [row for row in ROWS if any(means(name, row) for name in names)]
    for name in names:
        if not any(means(name, row) for row in ROWS):
            raise UserError(f"no experiment is called {name!r}; there are: all, {', '.join(TABLES)}, or TABLE/LABEL")
    return [(table, label, seed) for seed in SEEDS for table, label in wanted]


def listing():
    """A line for each row: its name, and its seeds that have run."""
    lines = []
    for table, labels in TABLES.items():
        for label in labels:
            done = [seed for seed in SEEDS if file_of(table, label, seed).exists()]
            lines.append(f"{table}/{label}: {', '.join(f'seed {seed}' for seed in done) or 'not run'}")
    return lines


def commands(table, label, seed, out):
    """The command lines of a run: its training into the folder `out`, and its measurement, or that alone.

    What was trained is measured on the same noise, bundled weights on another in each run.
    """
    table, label = first_of(table, label)
    flags = TABLES[table][label].split()
    script = flags.pop(0) if flags and flags[0].endswith(".py") else "train.py"
    measure = [sys.executable, "eval.py", "world", "--label", label, *MEASURE.split(), *EQUAL.split()]
    measure += ["--out", str(out / MEASURED)]
    if script == "eval.py":
        return [[*measure, *flags, "--seed", str(seed)]]
    most = flags[flags.index("--steps") + 1] if "--steps" in flags else "4"
    if script == "pretrain.py":
        most = "50"
    else:
        flags = [*SHORT.split(), *flags]
    if script == "train.py":
        flags = [*BASE.split(), *flags, "--sample-every", "0"]
    flags += [*EQUAL.split(), "--seed", str(seed), "--out", str(out)]
    if any((out / "checkpoints").glob("step_*")) or (out / "checkpoint.pt").exists():
        flags.append("--resume")
    steps, weights = [n for n in ALL if n <= most] if table == "ablation" else [most], weights_of(table, label).name
    return [[sys.executable, script, *flags], [*measure, "--weights", str(out / weights), "--steps", *steps]]


def run(names, hours=0.0):
    """Make what is missing of the named experiments, one run after the other, until `hours` are over (0: no limit)."""
    begun = time.time()
    for table, label, seed in chosen(names):
        file, out = file_of(table, label, seed), Path("runs/experiments") / name_of(table, label, seed)
        if file.exists():
            continue
        if hours and time.time() - begun > 3600 * hours:
            print(f"{hours:g} hours are over: the same command goes on from here")
            return
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "lock", "w") as lock, contextlib.suppress(BlockingIOError):  # another process makes this one
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print(f"{table}/{label}, seed {seed}", flush=True)
            common.write_json(file, make(commands(table, label, seed, out), out))


def make(lines, out):
    """Run the command lines of a run in the folder `out`. -> what results/ keeps of it"""
    minutes = []
    for command in lines:
        begin = os.times()
        if call(command):
            raise UserError(f"this failed: {' '.join(command)}")
        end = os.times()
        used = end.children_user + end.children_system - begin.children_user - begin.children_system
        minutes.append(used / 60)
    result = json.loads((out / MEASURED).read_text())
    return common.tidy(result | training_of(out, lines[0], minutes[0])) if len(lines) > 1 else result


def call(command):
    """Run a command -> its exit code. Ctrl-C reaches it as well, and it is given the time to save what it has."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


MEASURED = "measured.json"  # in the folder of a run, what eval.py has found
CURVES = ["score_gap", "vsd", "cd", "fake", "vsd_pull", "ft_pull"]  # what the log says of Algorithm 1, and of a reward
CURVES += ["lrm", "true_reward", "lrm_estimate", "rank_correlation"]
CURVES += ["reward", "reward_real", "reward_mean"]  # of samples and data (Fig. 8), and ddpo.py's (Fig. 12)
STRETCH = 10  # updates, over which a point of a curve is the mean


def training_of(out, command, minutes):
    """{"training": its command, CPU minutes, last values of the log, curves, sizes of files}."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    curves = {name: curve for name in CURVES if (curve := curve_of(lines, name))}
    sizes = {f.name: f.stat().st_size for f in out.glob("*.safetensors")}
    training = {"command": " ".join(["python", *command[1:]]), "log": last, "curves": curves, "bytes": sizes}
    if "--resume" not in command:  # or a part would stand for the whole
        training["cpu_minutes"] = minutes
    return {"training": training}


def curve_of(lines, name):
    """[[update, mean of what was logged in the STRETCH from there on], ...]."""
    stretches = {}
    for line in lines:
        if name in line:
            stretches.setdefault(line["step"] // STRETCH * STRETCH, []).append(line[name])
    return [[step, sum(values) / len(values)] for step, values in stretches.items()]


def read(table, label, folder):
    """The results of a row, one for each seed that has run."""
    files = [Path(folder) / file_of(table, label, seed).name for seed in SEEDS]
    return [read_json(file) for file in files if file.exists()]


LOGGED = ("score gap", "fake loss")  # of interest where something goes wrong


def scores_of(row, training, motion, reward):
    """What a table shows of one run: {header: (number or None, digits)}. motion: the teacher's; reward: of REWARDS."""
    log, sizes, curves = (training.get(name, {}) for name in ("log", "bytes", "curves"))
    ended = {name: curve[-1][1] for name, curve in curves.items()}  # the mean of its last STRETCH
    learned = sizes.get("adapter.safetensors", sizes.get("student.safetensors"))
    return {
        "right, mean of 7 factors, %": (100 * row["main"]["mean"], 1),
        "Frechet distance": (row["frechet"]["mean"], 2),
        "Vendi - 1": (row["vendi"]["mean"], 2),
        "object kept, %": (100 * row["identity"]["mean"], 1),
        "motion, % of the teacher's": (100 * row["motion"]["mean"] / motion if motion else None, 0),
        reward: (row.get("rewards", {}).get(reward, {}).get("mean"), 3),
        "rewarded clips": (log.get("reward_evaluations"), 0),
        "CPU minutes": (training.get("cpu_minutes"), 1),
        "MB": (learned and learned / 1e6, 1),
        "GiB": (log.get("peak_gib"), 2),
        "score gap": (ended.get("score_gap"), 2),
        "fake loss": (ended.get("fake"), 2),
    }


def rows_of(name, folder="results"):
    """Header and lines of the table of an experiment: means over the seeds that have run, and their standard errors.

    A run is measured in fewer steps as well where the first table asks for it; only there are they shown.
    """
    teacher = [row for result in read("ablation", "teacher", folder) for row in result["rows"] if row["steps"] == 50]
    motion = mean_error([row["motion"]["mean"] for row in teacher])["mean"] if teacher else None
    found, columns = {}, {}  # (label, steps): a list of scores_of; the headers of which some row has something to say
    for label in TABLES[name]:
        for result in read(name, label, folder):
            most = max(row["steps"] for row in result["rows"])
            for row in [row for row in result["rows"] if name == "ablation" or row["steps"] == most]:
                scores = scores_of(row, result.get("training", {}), motion, REWARDS.get(name, ""))
                found.setdefault((label, row["steps"]), []).append(scores)
                known = {header: digits for header, (value, digits) in scores.items() if value is not None}
                columns |= {header: known[header] for header in known if name == "troubles" or header not in LOGGED}
    missing = [label for label in TABLES[name] if label not in [drawn for drawn, _ in found]]
    lines = [[label, "", "not run", *[""] * len(columns)] for label in missing]
    for (label, steps), runs in found.items():
        line = [label, steps, len(runs)]
        for header, digits in columns.items():
            values = [run[header][0] for run in runs if run[header][0] is not None]
            line.append(pm(mean_error(values), 1, digits) if values else "")
        lines.append(line)
    lines.sort(key=lambda line: list(TABLES[name]).index(line[0]))
    return ["", "steps", "seeds", *columns], lines


def gains_of(name, folder="results"):
    """Header and lines: what each row of a table has more than the first of the same seed, prompts and noise.

    Means over the seeds that both have, and their standard errors; shares in points. A first row of bundled weights
    has no seed of training: it is taken with that of the noise on which all students are measured.
    """
    first, *others = TABLES[name]
    reward, lines, bundled = REWARDS[name], [], TABLES[name][first].startswith("eval.py")
    for label in others:
        gains = {}
        for seed in SEEDS:
            pair = file_of(name, label, seed), file_of(name, first, 0 if bundled else seed)
            files = [Path(folder) / file.name for file in pair]
            if all(file.exists() for file in files):
                ours, base = (read_json(file)["rows"][0] for file in files)
                for what in ("main", *MAIN, "identity", "frechet", "vendi"):
                    gains.setdefault(what, []).append(ours[what]["mean"] - base[what]["mean"])
                gains.setdefault(reward, []).append(ours["rewards"][reward]["mean"] - base["rewards"][reward]["mean"])
        if gains:
            points = [pm(mean_error(gains[what]), 100) for what in ("main", *MAIN, "identity")]
            other = [pm(mean_error(gains[what]), 1, 3) for what in (reward, "frechet", "vendi")]
            lines.append([label, len(gains["main"]), *points, *other])
    header = ["more than in the first row", "seeds", "mean of 7", *MAIN]
    return [*header, "object kept", reward, "Frechet", "Vendi - 1"], lines
