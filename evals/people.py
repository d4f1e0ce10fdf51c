"""People (the paper's section 8.1 and Fig. 13): which of two videos is better, four questions a pair.

`make_page` writes one HTML file that holds everything, videos too: it can be sent by mail and opened without a server
or a network. It shows pairs of videos of one prompt, both in the same size, frame rate and length, so that none of
these tells which is which; which side is whose, and the order of the pairs, are drawn anew for each rater. A vote
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
import torch.nn.functional as F

from common import UserError, atomic
from video import VIDEOS, read_video, write_video

QUESTIONS = {  # the paper's four, with what they ask for
    "visual quality": "sharp, clean, well lit, pleasant to look at",
    "text-video alignment": "objects, colours, style, places and actions as the prompt says",
    "motion": "steady in time, lively, without jitter",
    "general preference": "just the one you prefer",
}


def prompts_of(folder):
    """The videos below a folder: {what they share with their counterpart: (file, prompt)}.

    Counterparts have the same name, apart from what sample.py puts before it (student4-seed0-). The prompt stands in
    metadata.jsonl ({"file_name", "text"}) or is the name without VBench's -0 .. -4.
    """
    folder, said, found = Path(folder), {}, {}
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (table := folder / "metadata.jsonl").exists():
        try:
            said = {line["file_name"]: line["text"] for line in map(json.loads, table.read_text("utf-8").splitlines())}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{table} is not a line {{"file_name": ..., "text": ...}} a video: {e!r}') from e
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in VIDEOS:
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        key, drawn = re.subn(r"^(student|teacher)\d+-seed\d+-(\d+-)?", r"\2", name)
        words = re.sub(r"^\d+-", "", key).replace("-", " ") if drawn else re.sub(r"-\d+$", "", Path(key).name)
        found[key] = file, said.get(file.relative_to(folder).as_posix(), words)
    return found


def alike(a, b):
    """Two videos, each (uint8 (F, H, W, 3), fps), in the size, rate and length of the lesser -> two tensors, fps.

    The larger is scaled to cover the smaller and cut to it around the centre. Tensors (3, F, H, W) in [-1, 1].
    """
    fps = min(a[1], b[1])
    n = max(1, round(min(len(v) / rate for v, rate in (a, b)) * fps))
    height, width = min((v.shape[1:3] for v, _ in (a, b)), key=math.prod)
    out = []
    for pictures, rate in (a, b):
        when = [min(round(i * rate / fps), len(pictures) - 1) for i in range(n)]
        x = torch.from_numpy(pictures[when]).permute(0, 3, 1, 2).float() / 127.5 - 1  # (F, 3, H, W)
        scale = max(height / x.shape[2], width / x.shape[3])
        if x.shape[2:] != (height, width):
            size = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            x = x[:, :, top : top + height, left : left + width]
        out.append(x.transpose(0, 1))
    return *out, fps


def make_page(a, b, out, label_a="", label_b="", pairs=50, seed=0):
    """Write the page that compares the videos of folders a and b. -> (number of pairs, [files left out and why])

    pairs: at most so many, drawn at random by seed. Raises UserError where the folders have no readable pair.
    """
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
            coded = []
            for video in both:
                write_video(Path(work) / "v.mp4", video, fps)
                coded.append(base64.b64encode((Path(work) / "v.mp4").read_bytes()).decode())
            made.append({"pair": key, "prompt": ours[key][1], "a": coded[0], "b": coded[1]})
    if not made:
        raise UserError(f"{a} and {b} have no readable pair of videos of the same name")
    data = {"a": label_a or Path(a).name, "b": label_b or Path(b).name, "questions": QUESTIONS, "pairs": made}
    data["page"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
    with atomic(out) as part:
        part.write_text(PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")
    return len(made), left_out


# ---------------------------------------------------------------------------------------------------------------------
# votes


def read_votes(files):
    """Votes of files that the page saved, each rater's last on each pair. -> (votes, complaints)

    A vote is {"page", "rater", "pair", "a", "b", "answers": {question: "a" | "b" | "equal"}}.
    """
    votes, complaints, seen = {}, [], 0
    for file in files:
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8"))
            for vote in saved["votes"]:
                answers = {q: vote["answers"][q] for q in QUESTIONS}
                if not set(answers.values()) <= {"a", "b", "equal"}:
                    raise ValueError(f"an answer is none of a, b, equal: {answers}")
                about = {k: saved[k] for k in ("page", "rater", "a", "b")}
                who = saved["page"], saved["rater"].strip().lower(), vote["pair"]
                seen += 1
                if who not in votes or votes[who]["time"] <= vote.get("time", ""):
                    votes[who] = about | {"pair": vote["pair"], "answers": answers, "time": vote.get("time", "")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            complaints.append(f"{file} is no file of votes and is left out: {e!r}")
    if seen > len(votes):
        complaints.append(f"{seen - len(votes)} votes were there twice and count once")
    if not votes:
        raise UserError("no votes: " + ("; ".join(complaints) or "name the files that the page saved"))
    return list(votes.values()), complaints


def wilson(wins, n, z=1.959964):
    """95% interval of a share of `wins` among n: two shares in 0..1. With n = 0 it says nothing: 0, 1."""
    if n == 0:
        return 0.0, 1.0
    p, middle = wins / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (p + z * z / (2 * n) - half) / middle), min(1.0, (p + z * z / (2 * n) + half) / middle)


def count(votes):
    """Rows {"pair of models", "rater" (or "all"), "question", "a", "b", "equal", "rate", "low", "high"}: a's win rate
    without ties, 0..1 (None where all are ties), and its 95% interval."""
    rows = []
    for models in sorted({(v["a"], v["b"]) for v in votes}):
        of = [v for v in votes if (v["a"], v["b"]) == models]
        raters = sorted({v["rater"] for v in of})
        for rater in ["all", *(raters if len(raters) > 1 else [])]:
            for question in QUESTIONS:
                n = Counter(v["answers"][question] for v in of if rater in ("all", v["rater"]))
                low, high = wilson(n["a"], n["a"] + n["b"])
                rate = n["a"] / (n["a"] + n["b"]) if n["a"] + n["b"] else None
                row = {"models": models, "rater": rater, "question": question, "rate": rate, "low": low, "high": high}
                rows.append(row | {side: n[side] for side in ("a", "b", "equal")})
    return rows


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which video is better?</title>
<style>
:root { color-scheme: light dark; --line: #8886; --mark: #2b6cb0; }
* { box-sizing: border-box; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
header { display: flex; gap: 1rem; align-items: center; }
progress { flex: 1; height: .6rem; accent-color: var(--mark); }
#prompt { font-size: 1.15rem; margin: .8rem 0; min-height: 1.6rem; }
#videos { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
figure { margin: 0; text-align: center; }
video { width: 100%; max-height: 42vh; object-fit: contain; background: #0003; border-radius: 6px; }
.small video { image-rendering: pixelated; }
fieldset { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .3rem .7rem;
  display: grid; grid-template-columns: 1fr auto auto auto; gap: .5rem; align-items: center; }
fieldset.current { border-color: var(--mark); box-shadow: 0 0 0 1px var(--mark); }
fieldset small { display: block; opacity: .7; }
label.answer { border: 1px solid var(--line); border-radius: 6px; padding: .35rem .9rem; cursor: pointer; }
label.answer:has(:checked) { background: var(--mark); color: #fff; border-color: var(--mark); }
label.answer:focus-within { outline: 2px solid var(--mark); outline-offset: 1px; }
label.answer input { position: absolute; opacity: 0; pointer-events: none; }
button, input[type=text] { font: inherit; padding: .45rem .9rem; border-radius: 6px; border: 1px solid var(--line); }
button.main { background: var(--mark); color: #fff; border-color: var(--mark); }
button:disabled { opacity: .4; }
footer { display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; margin-top: .8rem; }
footer .keys { opacity: .7; font-size: .85rem; margin-left: auto; }
[hidden] { display: none !important; }
</style></head><body>
<section id="start">
  <h1>Which video is better?</h1>
  <p>You will see pairs of videos of the same prompt. For each pair say four times which side is better; a pair counts
  when all four are answered. Your answers stay in this browser until you save them as a file. You may stop at any time
  and go on later under the same name.</p>
  <form id="who"><input type="text" id="name" placeholder="Your name" autocomplete="off" required maxlength="60">
  <button class="main">Start</button></form>
</section>
<main id="vote" hidden>
  <header><progress id="bar" value="0"></progress><span id="done"></span></header>
  <p id="prompt"></p>
  <div id="videos">
    <figure><video id="left" muted loop autoplay playsinline></video><figcaption>Left</figcaption></figure>
    <figure><video id="right" muted loop autoplay playsinline></video><figcaption>Right</figcaption></figure>
  </div>
  <form id="questions"></form>
</main>
<section id="end" hidden><h1>Thank you.</h1><p>All pairs are answered. Please save your votes and send the file to
whoever gave you this page.</p></section>
<footer id="foot" hidden>
  <button id="back">Back</button><button id="next" class="main" disabled>Next pair</button>
  <button id="save">Save votes</button><button id="other">Another rater</button>
  <span id="warn"></span>
  <span class="keys">&larr; left, &rarr; right, &darr; equal, Enter: next, Backspace: back, Space: from the start</span>
</footer>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), questions = Object.keys(data.questions);
let memory = {}, name = "", order = [], at = 0, state, shown = Date.now();

// storage: the browser's, or this page's memory where the browser has none
const get = key => { try { return localStorage.getItem(key); } catch { return memory[key] ?? null; } };
const put = (key, value) => {
  memory[key] = value;
  try { localStorage.setItem(key, value); }
  catch { $("warn").textContent = "This browser stores nothing: save before you close the page."; }
};
const slot = who => `people:${data.page}:${who.trim().toLowerCase()}`;
const keep = () => put(slot(name), JSON.stringify(state));

// chance that depends on page, rater and pair alone: a reload shows the same sides again
function chance(text) {
  let h = 2166136261;
  for (const c of text) h = Math.imul(h ^ c.codePointAt(0), 16777619);
  h ^= h >>> 16; h = Math.imul(h, 2246822507); h ^= h >>> 13; h = Math.imul(h, 3266489909); h ^= h >>> 16;
  return (h >>> 0) / 4294967296;
}
const draw = (what, pair) => chance(`${what}|${data.page}|${slot(name)}|${pair.pair}`);
const leftOf = pair => draw("side", pair) < 0.5 ? "a" : "b";

function begin(who) {
  name = who.trim(); put(`people:${data.page}`, name);
  state = JSON.parse(get(slot(name)) || '{"votes": {}, "draft": {}}');
  order = data.pairs.map(pair => [draw("order", pair), pair]).sort((x, y) => x[0] - y[0]).map(x => x[1]);
  at = order.findIndex(pair => !(pair.pair in state.votes));
  if (at < 0) at = order.length;
  show();
}

function film(video, coded) {
  const bytes = Uint8Array.from(atob(coded), c => c.charCodeAt(0));
  URL.revokeObjectURL(video.src);
  video.src = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
}

function show() {
  const over = at >= order.length, voted = Object.keys(state.votes).length;
  $("start").hidden = true; $("vote").hidden = over; $("end").hidden = !over; $("foot").hidden = false;
  $("bar").max = order.length; $("bar").value = voted; $("done").textContent = `${voted} of ${order.length}`;
  $("back").disabled = at === 0; $("next").hidden = over;
  $("save").className = over ? "main" : "";
  if (over) return;
  const pair = order[at], left = leftOf(pair), right = left === "a" ? "b" : "a";
  $("prompt").textContent = pair.prompt;
  film($("left"), pair[left]); film($("right"), pair[right]);
  const vote = state.votes[pair.pair], side = x => x === "equal" ? x : x === left ? "left" : "right";
  const old = vote ? Object.fromEntries(questions.map(q => [q, side(vote.answers[q])])) : state.draft[pair.pair] || {};
  questions.forEach((q, i) => {
    for (const x of ["left", "right", "equal"]) $(`q${i}${x}`).checked = old[q] === x;
  });
  shown = Date.now(); mark(); $("videos").scrollIntoView({block: "nearest"});
}

const answers = () => Object.fromEntries(questions.map(
  (q, i) => [q, ["left", "right", "equal"].find(x => $(`q${i}${x}`).checked)]).filter(x => x[1]));

function mark() {  // the first open question is the one the keys answer
  const given = answers(), open = questions.findIndex(q => !(q in given));
  questions.forEach((q, i) => $(`q${i}`).classList.toggle("current", i === open));
  $("next").disabled = open >= 0;
  return open;
}

function answered() {
  state.draft[order[at].pair] = answers(); keep(); mark();
}

function next() {
  if (at >= order.length || mark() >= 0) return;
  const pair = order[at], left = leftOf(pair), right = left === "a" ? "b" : "a", given = answers();
  const whose = x => x === "equal" ? x : x === "left" ? left : right;
  state.votes[pair.pair] = {pair: pair.pair, prompt: pair.prompt, left,
    answers: Object.fromEntries(questions.map(q => [q, whose(given[q])])),
    seconds: Math.round((Date.now() - shown) / 1000), time: new Date().toISOString()};
  delete state.draft[pair.pair]; keep();
  at += 1; show();
}
const back = () => { if (at > 0) { at -= 1; show(); } };
const again = () => { for (const x of ["left", "right"]) { $(x).currentTime = 0; $(x).play(); } };

function save() {
  const votes = {page: data.page, a: data.a, b: data.b, rater: name, votes: Object.values(state.votes)};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(votes, null, 1)], {type: "application/json"}));
  link.download = `votes-${name.replace(/[^\\p{L}\\p{N}]+/gu, "-")}-${data.page}.json`;
  link.click();
  return votes;
}

questions.forEach((q, i) => {
  const box = document.createElement("fieldset"), words = document.createElement("span");
  box.id = `q${i}`; words.textContent = q[0].toUpperCase() + q.slice(1);
  words.append(Object.assign(document.createElement("small"), {textContent: data.questions[q]}));
  box.append(words);
  for (const x of ["left", "right", "equal"]) {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, {type: "radio", name: `q${i}`, id: `q${i}${x}`, value: x}); label.className = "answer";
    label.append(input, x[0].toUpperCase() + x.slice(1)); box.append(label);
  }
  $("questions").append(box);
});
if (data.pairs.length) $("left").onloadedmetadata = () =>
  $("videos").classList.toggle("small", $("left").videoHeight <= 128);
$("questions").onchange = answered;
$("questions").onsubmit = event => event.preventDefault();
$("who").onsubmit = event => { event.preventDefault(); if ($("name").value.trim()) begin($("name").value); };
$("next").onclick = next; $("back").onclick = back; $("save").onclick = save;
$("other").onclick = () => { put(`people:${data.page}`, ""); location.reload(); };
addEventListener("keydown", event => {
  if ($("foot").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const side = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal"}[event.key];
  const open = at < order.length ? mark() : -1;
  if (side && open >= 0) { $(`q${open}${side}`).checked = true; answered(); }
  else if (event.key === "Enter" && document.activeElement.tagName !== "BUTTON") next();
  else if (event.key === "Backspace") back();
  else if (event.key === " " && document.activeElement.tagName !== "BUTTON" && at < order.length) again();
  else if (!side) return;
  event.preventDefault();
});
if (get(`people:${data.page}`)) begin(get(`people:${data.page}`));
</script></body></html>
"""
