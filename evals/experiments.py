"""The paper's tables asked again in the small world: named runs, and one command that makes them.

    python eval.py experiments                            # the names, and which of their seeds have run
    python eval.py experiments ablation                   # all rows of a table; ablation/vsd is one of them
    python eval.py experiments all --budget 8             # what is missing, for 8 hours; begun again it goes on

A row is a label and the flags that make it; everything else is the default of train.py. Each runs with SEEDS, for the
same number of updates, its last weights are measured on the same prompts and the same noise, and results/ keeps one
small file a run. A stopped training goes on where it was. `eval.py tables` then writes docs/RESULTS.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import UserError
from evals.metrics import mean_error, pm

SEEDS = (0, 1, 2)
MEASURE = "--prompts 256 --vendi-prompts 16 --no-dimensions"
STUDENT = "--student weights/student.safetensors"
TUNE = f"{STUDENT} --iterations 60"  # the rewards' rows: from the same student, anchored by VSD and CD
POLICY = "ddpo.py --weights weights/student.safetensors --iterations 60"

# table -> {label: flags of train.py, or a script and its flags}
TABLES = {
    "ablation": {  # Table 3, and who gives CD's target (Eq. 6)
        "VSD + CD": "",
        "VSD": "--beta-cd 0",
        "CD, from its average": "--beta-vsd 0",
        "CD, from the student": "--beta-vsd 0 --cd-target student",
        "CD, from the teacher": "--beta-vsd 0 --cd-target teacher",
        "VSD + CD + LRM": "--reward agreement",
    },
    "tuning": {  # Table 5
        "no reward": TUNE,
        "LRM, scalar": f"{TUNE} --reward agreement --lrm-labels scalar",
        "LRM, parts": f"{TUNE} --reward agreement --lrm-labels parts",
        "DDPO": f"{POLICY} --reward agreement",
        "DDPO, raw": f"{POLICY} --reward agreement --advantage raw",
        "ReFL": f"{POLICY} --reward agreement --method refl",
        "DRaFT-1": f"{POLICY} --reward agreement --method draft --truncate 1",
    },
    "steps": {  # Table 6
        "2 steps, VSD + CD": "--steps 2",
        "2 steps, VSD": "--steps 2 --beta-cd 0",
        "1 step, VSD + CD": "--steps 1",
        "1 step, VSD": "--steps 1 --beta-cd 0",
    },
    "teacher-steps": {f"m = {m}": f"--m {m}" for m in (1, 2, 5, 10)},  # Table 7
    "prediction": {"conjugate": "", "sample": "--prediction sample"},  # Table 8
    "rank": {"full": ""} | {f"rank {r}": f"--rank {r} --lr 1e-3 --fake-lr 2e-3" for r in (8, 16, 32, 64)},
    "choices": {  # what the paper leaves open, one at a time
        "as it is": "",
        "1 fake update": "--fake-updates 1",
        "5 fake updates": "--fake-updates 5",
        "DDIM between steps": "--transition ddim",
        "noised data": "--generator-input data",
        "the KL's own weight": "--vsd-weight score",
    },
    "overoptimised": {  # Fig. 9, 14
        "LRM alone": f"{TUNE} --reward jpeg_compressibility --beta-vsd 0 --beta-cd 0",
        "LRM and KL": f"{TUNE} --reward jpeg_compressibility --beta-vsd 0 --beta-cd 0 --beta-kl 10",
    },
}


def file_of(table, label, seed):
    """Where results/ keeps a run."""
    words = "".join(c if c.isalnum() else "-" for c in label.lower())
    return Path("results") / f"experiment-{table}-{words}-{seed}.json"


def chosen(names):
    """[(table, label, seed), ...] of names: "all", a table, or table/label; first seeds first. Raises UserError."""
    rows = [(table, label) for table, labels in TABLES.items() for label in labels]
    wanted = [(t, l) for t, l in rows if any(name in ("all", t, f"{t}/{l}") for name in names)]
    for name in names:
        if name != "all" and not any(name in (t, f"{t}/{l}") for t, l in rows):
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
    """The two command lines of a run: its training into the folder `out`, and its measurement."""
    flags = TABLES[table][label].split()
    script = flags.pop(0) if flags and flags[0].endswith(".py") else "train.py"
    quiet = ["--sample-every", "0"] if script == "train.py" else []
    resume = ["--resume"] if any((out / "checkpoints").glob("step_*")) else []
    train = [sys.executable, script, *flags, "--seed", str(seed), *quiet, "--out", str(out), *resume]
    steps = ["4", "2", "1"]
    if "--steps" in flags:
        steps = [n for n in steps if int(n) <= int(flags[flags.index("--steps") + 1])]
    weights = ["--weights", str(out / "student.safetensors"), "--steps", *steps, "--label", label]
    measured = file_of(table, label, seed)
    return train, [sys.executable, "eval.py", "world", *weights, *MEASURE.split(), "--out", str(measured)]


def run(names, hours=0.0):
    """Make what is missing of the named experiments, one run after the other, until `hours` are over (0: no limit)."""
    begun = time.time()
    for table, label, seed in chosen(names):
        if file_of(table, label, seed).exists():
            continue
        if hours and time.time() - begun > 3600 * hours:
            print(f"{hours:g} hours are over: the same command goes on from here")
            return
        print(f"{table}/{label}, seed {seed}", flush=True)
        for command in commands(
            table, label, seed, Path("runs/experiments") / f"{table}-{label}-{seed}".replace(" ", "-")
        ):
            if subprocess.run(command).returncode:
                raise UserError(f"this failed: {' '.join(command)}")


def rows_of(name, folder="results"):
    """Header and lines of the table of an experiment: means over the seeds that have run, and their standard errors."""
    header = ["", "steps", "seeds", "right, mean of 7 factors, %", "Frechet distance", "Vendi - 1", "object kept, %"]
    lines = []
    for label in TABLES[name]:
        files = [Path(folder) / file_of(name, label, seed).name for seed in SEEDS]
        measured = [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
        if not measured:
            lines.append([label, "", "not run", "", "", "", ""])
        for steps in dict.fromkeys(row["steps"] for row in measured):
            rows = [row for row in measured if row["steps"] == steps]
            mean = lambda key, rows=rows: mean_error([row[key]["mean"] for row in rows])
            scores = [
                pm(mean("main"), 100),
                pm(mean("frechet"), 1, 2),
                pm(mean("vendi"), 1, 2),
                pm(mean("identity"), 100),
            ]
            lines.append([label, steps, len(rows), *scores])
    return header, lines
