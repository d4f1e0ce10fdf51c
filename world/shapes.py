"""The small world: captioned clips of which everything is known.

A clip is 16 frames of 64x64 pixels at 8 frames a second. An object acts before a textured scene, or two objects do, the
camera moves over the scene behind them, and a look is laid over all. Every clip follows from (seed, index) alone, so
the world is infinite, offline and the same on every machine.

Each of VBench's semantic dimensions has its factor here: object class (OBJECTS), multiple objects (the second object),
colour (COLOURS), spatial relationship (RELATIONS), human action (ACTIONS), scene (SCENES), temporal style (CAMERAS)
and appearance style (LOOKS). A caption names a random few of them and leaves the rest open: what is left open is what
makes few-step sampling hard. Only what can be seen is ever named: monochrome has no colour word, and no object has the
colours of its scene.

Nothing has a free place. A single object passes the centre in the middle of the clip, and its path follows from its
action alone; the two of a pair stand where their relation puts them; a scene begins at one of two offsets. A teacher
learns from this many times faster than from objects that may stand anywhere: at high noise the best guess of a clip is
the mean over all that its caption allows, and a mean over places has no outline left that a word could act on.

`Clip.make(seed, index)` draws the truth, `render(clips)` the pixels, `caption(clip, ...)` the words.
"""

import math
import random
import re
from dataclasses import dataclass

import torch

FRAMES, SIZE, FPS = 16, 64, 8
MIDDLE = FRAMES // 2  # the frame in which every path passes its centre
HELD_OUT = 1_000_000  # seed of the clips that nothing is trained on

OBJECTS = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "moon"]
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.97, 0.88, 0.15),
    "green": (0.12, 0.70, 0.22),
    "blue": (0.15, 0.30, 0.92),
    "purple": (0.53, 0.13, 0.72),
    "pink": (0.98, 0.55, 0.78),
    "white": (0.97, 0.97, 0.97),
}
SIZES = {"small": 14.0, "large": 20.0}  # radius in pixels: a latent cell is 8 wide, and a shape must fill several
PAIR = 12.0  # radius of each of two objects
# name -> (short words, long words)
ACTIONS = {
    "left": ("moves left", "drifts left"),
    "right": ("moves right", "drifts right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
    "springs": ("springs", "springs and tumbles"),  # up to the centre and down again
    "grows": ("grows", "gets larger"),
    "shrinks": ("shrinks", "gets smaller"),
    "still": ("stays still", "stands still"),
}
RELATIONS = {"left": "left of", "above": "above"}  # of the first object to the second
REVERSED = {"left": "right of", "above": "below"}  # the same said of the second to the first
SCENES = {
    "night": ("at night", "under the stars"),
    "meadow": ("in a meadow", "over a meadow"),
    "sea": ("at sea", "over the sea"),
    "desert": ("in a desert", "over the sand"),
    "checkerboard": ("on a checkerboard", "before a checkerboard"),
}
PAN = 20.0  # pixels a clip: by a whole period the scene would end as it began
OFFSETS = (-4, 4)  # pixels: where a scene's texture, of period 32, may begin
CAMERAS = {  # no two contrary moves: at high noise a network draws their mean, in which there is no motion
    "static": ("static camera", "camera stands still"),
    "pan left": ("pan left", "camera pans left"),
    "zoom in": ("zoom in", "camera zooms in"),
}
LOOKS = {
    "plain": ("plain", "in plain style"),
    "monochrome": ("monochrome", "in monochrome style"),
    "neon": ("neon", "in neon style"),
}

# Colours in which an object would melt into its scene.
SCENE_COLOURS = {
    "night": {"blue", "purple"},
    "meadow": {"green"},
    "sea": {"blue"},
    "desert": {"orange", "yellow"},
    "checkerboard": set(),
}
MONOCHROME = {"desert": "purple"}  # the colour whose grey differs most from the scene's; elsewhere white

# The factors a judge reads and a caption may name, with their values in the order of the class indices.
FACTORS = {
    "object": OBJECTS,
    "colour": list(COLOURS),
    "size": list(SIZES),
    "action": list(ACTIONS),
    "relation": list(RELATIONS),
    "object2": OBJECTS,
    "colour2": list(COLOURS),
    "scene": list(SCENES),
    "camera": list(CAMERAS),
    "look": list(LOOKS),
}
# How many factors a caption names, and how much more often one of them than another.
COUNTS = {1: 0.30, 2: 0.35, 3: 0.25, 9: 0.10}
OFTEN = {"object": 3, "colour": 2, "size": 1, "action": 3, "relation": 4, "scene": 2, "camera": 5, "look": 1.5}


@dataclass(frozen=True)
class Clip:
    """The whole truth of one clip. In a pair the first object is the left or the upper one, and both act alike."""

    object: str
    colour: str
    size: str | None  # None: a pair, or an object whose size changes
    action: str
    relation: str | None  # None: a single object
    object2: str | None
    colour2: str | None
    scene: str
    camera: str
    look: str
    offset: int  # of the scene's texture, in pixels

    @staticmethod
    def make(seed, index, **fixed):
        """Clip `index` of the world `seed`; factors given by name in `fixed` are kept if a clip can have them all."""
        rng = random.Random(f"shapes {seed} {index}")
        for _ in range(100000):
            clip = Clip.at_random(rng)
            if all(getattr(clip, name) == value for name, value in fixed.items()):
                return clip
        raise ValueError(f"no clip of the small world has {fixed}")

    @staticmethod
    def at_random(rng):
        scene, look, camera = rng.choice(list(SCENES)), rng.choice(list(LOOKS)), rng.choice(list(CAMERAS))
        relation = rng.choice(list(RELATIONS)) if rng.random() < 0.2 else None
        object, object2 = rng.sample(OBJECTS, 2)
        actions = list(ACTIONS)
        if relation:  # along the other axis, so that the two stay where they are to each other
            actions = ["up", "down", "springs"] if relation == "left" else ["left", "right"]
            actions += ["grows", "shrinks", "still"]
        action = rng.choice(actions)
        size = None if relation or action in ("grows", "shrinks") else rng.choice(list(SIZES))
        colour, colour2 = rng.sample([c for c in COLOURS if c not in SCENE_COLOURS[scene]], 2)
        if look == "monochrome":
            colour = colour2 = MONOCHROME.get(scene, "white")
        if not relation:
            object2 = colour2 = None
        offset = rng.choice(OFFSETS)
        return Clip(object, colour, size, action, relation, object2, colour2, scene, camera, look, offset)

    def visible(self, still=False):
        """{factor: value} of what can be seen in this clip, hence named in a caption or asked of a judge.

        still: in its middle frame alone, which shows neither an action nor a camera's move.
        """
        hidden = {"colour", "colour2"} if self.look == "monochrome" else set()
        hidden |= {"action", "camera"} if still else set()
        values = {name: getattr(self, name) for name in FACTORS if name not in hidden}
        return {name: value for name, value in values.items() if value is not None}

    def truth(self):
        """Class index of every factor in the order of FACTORS, -1 where it cannot be seen."""
        seen = self.visible()
        return [values.index(seen[name]) if name in seen else -1 for name, values in FACTORS.items()]


# ---------------------------------------------------------------------------------------------------------------------
# pixels


def signed_distance(name, x, y):
    """Distance to the outline of the unit-radius object, negative inside; y points down. Same shape as x."""
    ax, ay = x.abs(), y.abs()
    if name == "circle":
        return torch.hypot(x, y) - 0.95
    if name == "square":
        return torch.maximum(ax, ay) - 0.82
    if name == "triangle":
        return torch.maximum(y - 0.55, 0.866 * ax - 0.5 * y - 0.5)
    if name == "ring":
        return (torch.hypot(x, y) - 0.70).abs() - 0.27
    if name == "cross":
        return torch.minimum(torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95))
    if name == "heart":  # a square on its corner with a circle on each upper edge
        return torch.minimum((ax + (y - 0.1).abs() - 0.78) / math.sqrt(2), torch.hypot(ax - 0.39, y + 0.29) - 0.5515)
    if name == "moon":  # a disc less another disc
        return torch.maximum(torch.hypot(x, y) - 0.95, 0.78 - torch.hypot(x - 0.55, y))
    # the star: fold the plane into one half of one of five points, then one straight edge is left
    fifth = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
    radius = torch.hypot(x, y)
    return (radius * angle.cos() - 1.05) * 0.384 + radius * angle.sin() * 0.923


def draw_scene(name, x, y):
    """Colours (B, 3, F, H, W) in [0, 1] of a scene at its own coordinates x, y (B, 1, F, H, W), in pixels.

    Soft and of period 32 in x, so that it can be compressed and a movement of the camera can be seen.
    """

    def wave(phase):
        return 0.5 + 0.5 * torch.sin(2 * math.pi * phase)

    def spots(x, y, width):
        """Soft spots in the middles of squares of 32 pixels."""
        u, v = torch.remainder(x, 32) - 16, torch.remainder(y, 32) - 16
        return torch.exp(-0.5 * (u**2 + v**2) / width**2)

    if name == "night":
        low, high, amount = (0.05, 0.07, 0.24), (1.0, 0.95, 0.75), spots(x, y, 2.8) + spots(x + 16, y + 16, 2.2)
    elif name == "meadow":
        low, high, amount = (0.20, 0.47, 0.16), (0.42, 0.70, 0.30), wave((x + 0.5 * y) / 32)
    elif name == "sea":
        low, high, amount = (0.08, 0.34, 0.58), (0.38, 0.68, 0.84), wave((y + 3.5 * torch.sin(math.pi * x / 16)) / 16)
    elif name == "desert":
        low, high, amount = (0.76, 0.58, 0.36), (0.95, 0.83, 0.62), wave((x - 6 * torch.cos(math.pi * y / 24)) / 32)
    elif name == "checkerboard":
        check = torch.tanh(3 * torch.sin(math.pi * x / 16) * torch.sin(math.pi * y / 16))
        low, high, amount = (0.34, 0.34, 0.37), (0.58, 0.58, 0.60), 0.5 + 0.5 * check
    image = mix(rgb([low], x), rgb([high], x), amount)
    return mix(image, rgb([(0.98, 0.95, 0.70)], x), spots(x, y, 3.0)) if name == "meadow" else image


def rgb(colours, like):
    """B colours -> (B, 3, 1, 1, 1) on the device of `like`."""
    return torch.tensor(colours, device=like.device).view(-1, 3, 1, 1, 1)


def mix(low, high, amount):
    return low + (high - low) * amount


def path(clip):
    """How an object moves from where it stands in the middle of the clip: five numbers for `render`.

    At times -0.5..0.5 it is right * time pixels to the right of there and down * time + 2 drop * time^2 below, and its
    radius is radius + growth * time.
    """
    reach = 16.0 if clip.relation else 24.0
    change = 9.0 if clip.relation else 12.0
    right = {"right": reach, "left": -reach}.get(clip.action, 0.0)
    down = {"down": reach, "up": -reach}.get(clip.action, 0.0)
    drop = reach if clip.action == "springs" else 0.0  # the parabola of what is thrown
    growth = {"grows": change, "shrinks": -change}.get(clip.action, 0.0)
    radius = PAIR if clip.relation else SIZES.get(clip.size, 14.0)
    if growth and clip.relation:
        radius -= 0.5
    return right, down, drop, radius, growth


def by_name(names, draw, *coordinates):
    """draw(name, x, y) of B clips, each with a name of its own in `names`; x and y: (B, 1, F, H, W)."""
    drawn = None
    for name in sorted(set(names)):
        index = torch.tensor([i for i, other in enumerate(names) if other == name], device=coordinates[0].device)
        some = draw(name, *(x[index] for x in coordinates))
        if drawn is None:
            drawn = some.new_empty(len(names), *some.shape[1:])
        drawn[index] = some
    return drawn


def render(clips, frame=None, device="cpu"):
    """The clips' pixels (B, 3, F, SIZE, SIZE) in [-1, 1], and masks of their objects (B, 1, F, SIZE, SIZE) in [0, 1].

    F is FRAMES, or 1 for the one frame asked for. Clips are drawn together, for a GPU a thousand at once; a CPU is
    faster with a few, which its caches hold.
    """
    together = 8 if torch.device(device).type == "cpu" else 1024
    parts = [render_together(clips[i : i + together], frame, device) for i in range(0, len(clips), together)]
    videos, masks = zip(*parts)
    return torch.cat(videos), torch.cat(masks)


def render_together(clips, frame, device):
    """As `render`, in one go."""

    def column(values):
        """One number a clip -> (B, 1, 1, 1, 1)."""
        return torch.tensor(values, device=device).view(-1, 1, 1, 1, 1)

    time = torch.linspace(-0.5, 0.5, FRAMES)
    time = (time if frame is None else time[frame : frame + 1]).to(device)[:, None, None]  # (F, 1, 1)
    x = torch.arange(SIZE, device=device) - (SIZE - 1) / 2  # on the screen, in pixels from its centre
    y = x[:, None]

    scale = 1 - column([0.6 if clip.camera == "zoom in" else 0.0 for clip in clips]) * time
    shift = column([-PAN if clip.camera == "pan left" else 0.0 for clip in clips]) * time
    shift = shift + column([clip.offset for clip in clips])
    on_scene = torch.broadcast_tensors(x * scale + shift, y * scale)  # two of (B, 1, F, H, W)
    image = by_name([clip.scene for clip in clips], draw_scene, *on_scene)  # (B, 3, F, H, W)
    neon, grey = ([i for i, clip in enumerate(clips) if clip.look == look] for look in ("neon", "monochrome"))
    image[neon] *= 0.35

    right, down, drop, radius, growth = (column(values) for values in zip(*map(path, clips)))
    move_x, move_y, radius = right * time, down * time + 2 * time * (drop * time), radius + growth * time
    mask = torch.zeros_like(image[:, :1])
    firsts = [(i, clip.object, clip.colour, -16.0) for i, clip in enumerate(clips)]
    seconds = [(i, clip.object2, clip.colour2, 16.0) for i, clip in enumerate(clips) if clip.relation]
    for objects in filter(None, (firsts, seconds)):
        index, names, colours, sides = zip(*objects)
        side_x = column([side if clips[i].relation == "left" else 0.0 for i, side in zip(index, sides)])
        side_y = column([side if clips[i].relation == "above" else 0.0 for i, side in zip(index, sides)])
        shining = [j for j, i in enumerate(index) if i in neon]
        index = torch.tensor(index, device=device)
        r = radius[index]
        own = torch.broadcast_tensors((x - move_x[index] - side_x) / r, (y - move_y[index] - side_y) / r)
        distance = r * by_name(names, signed_distance, *own)  # in pixels, (n, 1, F, H, W)
        paint = rgb([COLOURS[colour] for colour in colours], image)
        under = image[index]
        glow = 0.7 * torch.exp(-distance[shining].clamp(min=0) / 3.5)  # falls off outside the outline
        under[shining] = mix(under[shining], paint[shining], glow)
        cover = (0.5 - distance / 2).clamp(0, 1)  # two pixels from outside to inside
        image[index] = mix(under, paint, cover)
        mask[index] = torch.maximum(mask[index], cover)
    image[grey] = (image[grey] * rgb([(0.299, 0.587, 0.114)], image)).sum(1, keepdim=True)
    return (image * 2 - 1).clamp(-1, 1), mask


def render_batch(clips):
    """(B, 3, FRAMES, SIZE, SIZE)"""
    return render(clips)[0]


# ---------------------------------------------------------------------------------------------------------------------
# words

TABLES = {"action": ACTIONS, "scene": SCENES, "camera": CAMERAS, "look": LOOKS}
PHRASES = {word: ("object", word) for word in OBJECTS} | {word: ("colour", word) for word in COLOURS}
PHRASES |= {word: ("size", word) for word in SIZES}
PHRASES |= {phrase: ("relation", name) for name, phrase in RELATIONS.items()}
PHRASES |= {phrase: ("reversed", name) for name, phrase in REVERSED.items()}
for _factor, _table in TABLES.items():
    for _name, _pair in _table.items():
        PHRASES |= dict.fromkeys(_pair, (_factor, _name))
WORDS = sorted({word for phrase in [*PHRASES, "a", "an", "shape"] for word in phrase.split()})


def words_of(prompt):
    """The words of a prompt, in lower case and without punctuation."""
    return re.findall(r"\w+(?:['-]\w+)*", prompt.lower())


def caption(clip, style, rng=None, still=False):
    """Words for a clip, and the factors that they name: {factor: value}.

    style "long": every visible factor in full words, and "short": the objects and what they do (the two lengths of the
    paper's Table 9); "object": the first object alone, all else left open; "train": one to three factors, now and then
    all of them, in either wording, drawn from `rng`. still: of the middle frame alone.
    """
    seen = clip.visible(still)
    named, wording, reverse = set(seen), 0, False
    if style == "long":
        wording = 1
    elif style == "short":
        named = {"object", "colour", "relation", "object2", "colour2", "action"}
    elif style == "object":
        named = {"object"}
    else:
        count = rng.choices(list(COUNTS), COUNTS.values())[0]
        order = sorted((f for f in OFTEN if f in seen), key=lambda f: rng.random() ** (1 / OFTEN[f]), reverse=True)
        named, wording, reverse = set(order[:count]), rng.randrange(2), rng.random() < 0.5
        if "relation" in named:
            named |= {"object", "object2"} | ({"colour2"} if "colour" in named else set())
    names = {name: value for name, value in seen.items() if name in named}

    def noun(*factors):
        words = [names[f] for f in factors if f in names]
        if factors[-1] not in names:
            words.append("shape")
        return ["an" if words[0] == "orange" else "a", *words]

    words = noun("size", "colour", "object")
    if "relation" in names:
        second = noun("colour2", "object2")
        if reverse:
            words = [*second, REVERSED[names["relation"]], *words]
        else:
            words = [*words, RELATIONS[names["relation"]], *second]
    words += [phrases[names[factor]][wording] for factor, phrases in TABLES.items() if factor in names]
    return " ".join(words), names


def held_out(n, seed=HELD_OUT, style="train"):
    """The first n clips that nothing is trained on, a prompt of each (style: of `caption`), and what it names."""
    clips = [Clip.make(seed, i) for i in range(n)]
    words = [caption(clip, style, random.Random(f"held out {i}")) for i, clip in enumerate(clips)]
    return clips, [prompt for prompt, _ in words], [named for _, named in words]


def parse(prompt):
    """The factors {factor: value} that a caption names: the inverse of `caption`, also for a user's own words.

    The longest phrase wins, so that "moves left" is an action and "left of" a relation. Words that are no phrase of
    the world are passed over; what stands after a relation belongs to the other object. "a right of b" is read as "b
    left of a".
    """
    words, names = words_of(prompt), {}
    while words:
        lengths = [n for n in (3, 2, 1) if " ".join(words[:n]) in PHRASES]
        if lengths:
            factor, value = PHRASES[" ".join(words[: lengths[0]])]
            if factor in ("object", "colour") and ("relation" in names or "reversed" in names):
                factor += "2"
            names.setdefault(factor, value)
        words = words[lengths[0] if lengths else 1 :]
    if relation := names.pop("reversed", None):
        turned = {"object": "object2", "object2": "object", "colour": "colour2", "colour2": "colour"}
        names = {turned.get(factor, factor): value for factor, value in names.items()} | {"relation": relation}
    return names
