"""People (the paper's section 8.1 and Fig. 13): which of two videos is better, four questions a pair.

`make_page` fills people.html and writes one file that holds everything, videos too: it can be sent by mail and opened
without a server or a network. It shows pairs of videos of one prompt, both in the same size, frame rate and length, so
that none of these tells which is which; which side is whose, and the order of the pairs, depend on the rater. A vote
counts when all four questions are answered, lives in the browser's storage, and leaves it as a JSON file, of which
`count` makes win rates without ties, as the paper's Fig. 6 shows them, with 95% Wilson intervals.
"""

import base64
import hashlib
import json
import math
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch

from captions import list_clips
from common import UserError, atomic, read_text
from video import VIDEOS, fit, read_video, write_video

QUESTIONS = {  # the paper's four, with what they ask for
    "visual quality": "sharp, clean, well lit, pleasant to look at",
    "text-video alignment": "objects, colours, style, places and actions as the prompt says",
    "motion": "steady in time, lively, without jitter",
    "general preference": "just the one you prefer",
}


def prompts_of(folder):
    """The videos below a folder: {what they share with their counterpart: (file, prompt)}.

    Counterparts have the same name, apart from what sample.py puts before it (student4-seed0-). The prompt is the
    caption (captions.py), or the name without VBench's -0 .. -4. Raises UserError as `list_clips`.
    """
    captions, skipped = list_clips(folder)
    found = {}
    for name in sorted([*captions, *skipped]):
        if Path(name).suffix.lower() not in VIDEOS:
            continue
        key, ours = re.subn(r"^(student|teacher)\d+-seed-?\d+-(\d+-)?", r"\2", str(Path(name).with_suffix("")))
        words = re.sub(r"^\d+-", "", key).replace("-", " ") if ours else re.sub(r"-\d+$", "", Path(key).name)
        if key in found:
            raise UserError(f"{found[key][0]} and {name} are two videos of one prompt: want a folder for each model")
        found[key] = Path(folder, name), captions.get(name, words)
    return found


def alike(a, b):
    """Two videos, each (uint8 (F, H, W, 3), fps), in the size, rate and length of the lesser -> two tensors, fps.

    The larger is scaled to cover the smaller and cut to it around the centre. Tensors (3, F, H, W) in [-1, 1].
    """
    fps = min(a[1], b[1])
    n = max(1, round(min(len(frames) / rate for frames, rate in (a, b)) * fps))
    height, width = min((frames.shape[1:3] for frames, _ in (a, b)), key=math.prod)
    out = []
    for frames, rate in (a, b):
        when = [min(round(i * rate / fps), len(frames) - 1) for i in range(n)]
        out.append(fit(torch.from_numpy(frames[when]).permute(3, 0, 1, 2), height, width) / 127.5 - 1)
    return *out, fps


def make_page(a, b, out, pairs=50, seed=0):
    """Write the page that compares the videos of folders a and b. -> (number of pairs, [files left out and why])

    pairs: at most so many, drawn at random by seed. Raises UserError where the folders have no readable pair.
    """
    if Path(a).resolve() == Path(b).resolve():
        raise UserError(f"{a} and {b} are one folder: want two models")
    ours, theirs = prompts_of(a), prompts_of(b)
    shared = sorted(set(ours) & set(theirs))
    random.Random(f"pairs {seed}").shuffle(shared)
    made, left_out = [], [f"{key}: only in one folder" for key in sorted(set(ours) ^ set(theirs))]
    with tempfile.TemporaryDirectory() as work:
        for key in shared:
            if len(made) == pairs:
                break
            try:
                *both, fps = alike(read_video(ours[key][0]), read_video(theirs[key][0]))
            except UserError as e:
                left_out.append(str(e))
                continue
            pair = {"pair": key, "prompt": ours[key][1]}
            for side, video in zip("ab", both):
                write_video(file := Path(work, "video.mp4"), video, fps)
                pair[side] = base64.b64encode(file.read_bytes()).decode()
            made.append(pair)
    if not made:
        raise UserError(f"{a} and {b} have no readable pair of videos of the same name")
    names = [Path(folder).name for folder in (a, b)]
    names = names if names[0] != names[1] else [str(a), str(b)]
    data = {"a": names[0], "b": names[1], "questions": QUESTIONS, "pairs": made}
    data["page"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
    with atomic(out) as part:
        page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        part.write_text(page.replace("DATA", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")
    return len(made), left_out


# ---------------------------------------------------------------------------------------------------------------------
# votes


def read_votes(files):
    """The votes in files that the page saved, each rater's last on each pair; UserError for any other file.

    A vote is {"page", "rater", "a", "b", "pair", "time", "answers": {question: "a" | "b" | "equal"}, ...}.
    """
    votes, raters = {}, {}  # a rater's name, as first spelled
    for file in files:
        try:
            saved = json.loads(read_text(file))
            about = {key: saved[key] for key in ("page", "a", "b")}
            rater = saved["rater"].strip()
            about["rater"] = raters.setdefault(rater.lower(), rater)
            for vote in saved["votes"]:
                key = saved["page"], about["rater"], vote["pair"]
                if not set(vote["answers"].values()) <= {"a", "b", "equal"}:
                    raise ValueError(f"an answer is a, b or equal, not {vote['answers']}")
                if key not in votes or votes[key]["time"] <= vote["time"]:
                    votes[key] = about | vote | {"answers": dict(vote["answers"])}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{file} is no file of votes: {e!r}") from e
    if not votes:
        raise UserError("no votes: name the files that the page saved")
    return list(votes.values())


def wilson(wins, n, z=1.959964):
    """95% interval of a share of `wins` among n: two shares in 0..1. With n = 0 it says nothing: 0, 1."""
    if n == 0:
        return 0.0, 1.0
    p, middle = wins / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (p + z * z / (2 * n) - half) / middle), min(1.0, (p + z * z / (2 * n) + half) / middle)


def count(votes):
    """Rows {"models": (a, b), "rater" (None: all), "question", "a", "b", "equal", "rate", "low", "high"}: a's win rate
    without ties, 0..1 (None where all are ties), and its 95% interval."""
    groups = {}
    for vote in votes:
        for rater in (None, vote["rater"]):
            for question, answer in vote["answers"].items():
                groups.setdefault((vote["a"], vote["b"], rater, question), []).append(answer)
    rows = []
    for (a, b, rater, question), answers in groups.items():
        n = Counter(answers)
        decided = n["a"] + n["b"]
        low, high = wilson(n["a"], decided)
        rate = n["a"] / decided if decided else None
        row = {"models": (a, b), "rater": rater, "question": question, "rate": rate, "low": low, "high": high}
        rows.append(row | {side: n[side] for side in ("a", "b", "equal")})
    # all raters together first
    return sorted(rows, key=lambda row: (row["models"], row["rater"] or ""))
