"""The shapes world: captioned clips of which everything is known.

A clip is 16 frames of 64x64 pixels at 8 frames a second. One or two objects stand before a textured scene; the first
one (the subject) acts, the camera moves over the scene behind it, and a look is laid over all. Every clip follows from
(seed, index) alone, so the world is infinite, offline and the same on every machine.

Each of VBench's semantic dimensions has its factor here: object class (OBJECTS), multiple objects (the second object),
colour (COLOURS), spatial relationship (RELATIONS), human action (ACTIONS), scene (SCENES), temporal style (CAMERAS)
and appearance style (LOOKS). A caption names a random few of them and leaves the rest open: what is left open is what
makes few-step sampling hard. Only what can be seen is ever named: a circle never spins, black and white has no colour
word, no object has the colours of its scene, and in a pair only the first object acts, so that it is known which one
is the subject.

`Clip.make(seed, index)` draws the truth, `render(clip)` the pixels, `caption(clip, ...)` the words.
"""

import math
import random
from dataclasses import asdict, dataclass

import torch

FRAMES, SIZE, FPS = 16, 64, 8
HELD_OUT = 1_000_000  # seed of the clips that nothing is trained on

OBJECTS = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond"]
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.97, 0.88, 0.15),
    "green": (0.15, 0.68, 0.22),
    "blue": (0.15, 0.32, 0.92),
    "purple": (0.53, 0.15, 0.70),
    "pink": (0.98, 0.55, 0.75),
    "black": (0.06, 0.06, 0.06),
    "white": (0.97, 0.97, 0.97),
}
SIZES = {"small": 12.0, "large": 18.0}  # radius in pixels: a latent cell is 8 wide, and a shape must fill several
PAIR = 12.0  # radius of each of two objects
# name -> (short words, long words)
ACTIONS = {
    "left": ("moves left", "drifts from right to left"),
    "right": ("moves right", "drifts from left to right"),
    "up": ("moves up", "rises from bottom to top"),
    "down": ("moves down", "sinks from top to bottom"),
    "bounces": ("bounces", "bounces up and down"),
    "spins": ("spins", "spins around its centre"),
    "grows": ("grows", "grows larger and larger"),
    "shrinks": ("shrinks", "shrinks smaller and smaller"),
    "orbits": ("orbits", "moves in a circle"),
    "still": ("stays still", "stays completely still"),
}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "below"),
}
SCENES = {
    "night": ("at night", "under a night sky"),
    "sunset": ("at sunset", "before a glowing sunset"),
    "meadow": ("in a meadow", "over a green meadow"),
    "sea": ("at sea", "over the blue sea"),
    "bricks": ("before bricks", "before a brick wall"),
    "checkerboard": ("on a checkerboard", "on a grey checkerboard"),
}
CAMERAS = {
    "static": ("static camera", "while the camera stays static"),
    "pan left": ("pan left", "while the camera pans left"),
    "pan right": ("pan right", "while the camera pans right"),
    "tilt up": ("tilt up", "while the camera tilts up"),
    "tilt down": ("tilt down", "while the camera tilts down"),
    "zoom in": ("zoom in", "while the camera zooms in"),
    "zoom out": ("zoom out", "while the camera zooms out"),
}
LOOKS = {
    "plain": ("plain", "in a plain style"),
    "pixel art": ("pixel art", "in pixel art style"),
    "black and white": ("black and white", "in black and white"),
    "neon": ("neon", "in neon style"),
    "watercolour": ("watercolour", "in watercolour style"),
}

# Colours in which an object would melt into its scene.
SCENE_COLOURS = {
    "night": {"blue", "black", "purple"},
    "sunset": {"red", "orange", "yellow", "pink", "purple"},
    "meadow": {"green", "yellow"},
    "sea": {"blue"},
    "bricks": {"red", "orange"},
    "checkerboard": set(),
}
LOOK_COLOURS = {"neon": {"black"}, "watercolour": {"white"}}

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


@dataclass(frozen=True)
class Clip:
    """The whole truth of one clip. Positions are in pixels from the centre, y downwards; angles in radians."""

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
    x: float  # the subject's mean place
    y: float
    x2: float
    y2: float
    turn: float  # +1 or -1: the sense of a spin or an orbit
    phase: tuple[float, float]  # where the scene's texture begins, and where an orbit does

    @staticmethod
    def make(seed: int, index: int, **fixed: str | None) -> "Clip":
        """Clip `index` of the world `seed`; factors given by name in `fixed` are kept if a clip can have them all."""
        rng = random.Random(f"shapes {seed} {index}")
        for _ in range(100000):
            clip = Clip._draw(rng)
            if all(getattr(clip, name) == value for name, value in fixed.items()):
                return clip
        raise ValueError(f"no clip of the shapes world has {fixed}")

    @staticmethod
    def _draw(rng: random.Random) -> "Clip":
        scene, look, camera = rng.choice(list(SCENES)), rng.choice(list(LOOKS)), rng.choice(list(CAMERAS))
        pair = rng.random() < 0.3 and look != "pixel art"  # 4-pixel blocks would leave too little of two small objects
        relation = rng.choice(list(RELATIONS)) if pair else None
        object, object2 = rng.sample(OBJECTS, 2)
        actions = list(ACTIONS)
        if pair:  # the subject must act, and its path must keep the relation true in every frame
            actions = ["up", "down", "bounces"] if relation in ("left", "right") else ["left", "right"]
            actions += ["spins", "grows", "shrinks"]
        if object in ("circle", "ring"):
            actions.remove("spins")
        action = rng.choice(actions)
        size = None if pair or action in ("grows", "shrinks") else rng.choice(list(SIZES))
        if look == "pixel art" and size:
            size = "large"
        colours = [c for c in COLOURS if c not in SCENE_COLOURS[scene] | LOOK_COLOURS.get(look, set())]
        if look == "black and white":  # grey must differ from the scene's grey
            colours = ["white", "yellow", "pink"] if scene == "night" else ["white", "black"]
        colour, colour2 = rng.sample(colours, 2)
        jitter = lambda r: rng.uniform(-r, r)
        x, y, x2, y2 = jitter(8), jitter(8), 0.0, 0.0
        if action in ("left", "right"):
            x = jitter(2)
        if action in ("up", "down", "bounces"):
            y = jitter(2)
        if pair:
            side = -1 if relation in ("left", "above") else 1
            along, across, across2 = 15 + jitter(1.5), jitter(4), jitter(4)
            x, y, x2, y2 = side * along, across, -side * along, across2
            if relation in ("above", "below"):
                x, y, x2, y2 = y, x, y2, x2
        return Clip(
            object, colour, size, action, relation, object2 if pair else None, colour2 if pair else None,
            scene, camera, look, x, y, x2, y2, rng.choice([-1.0, 1.0]), (rng.uniform(0, 64), rng.uniform(0, 64)),
        )  # fmt: skip

    def visible(self) -> dict[str, str]:
        """The factors that can be seen in this clip, hence named in a caption or asked of a judge."""
        seen = {name: getattr(self, name) for name in FACTORS if getattr(self, name) is not None}
        if self.look == "black and white":
            seen.pop("colour"), seen.pop("colour2", None)
        return seen

    def truth(self) -> list[int]:
        """Class index of every factor in the order of FACTORS, -1 where it cannot be seen."""
        seen = self.visible()
        return [values.index(seen[name]) if name in seen else -1 for name, values in FACTORS.items()]

    def to_dict(self) -> dict:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------------------------
# pixels


def signed_distance(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
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
    if name == "diamond":  # narrow, so that a spinning square is never taken for one
        return (ax / 0.58 + ay - 1) * 0.5
    if name == "heart":  # a square on its corner with a circle on each upper edge
        return torch.minimum((ax + (y - 0.1).abs() - 0.78) / math.sqrt(2), torch.hypot(ax - 0.39, y + 0.29) - 0.5515)
    if name == "star":  # fold the plane into one half of one of five points, then one straight edge is left
        fifth = 2 * math.pi / 5
        angle = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
        radius = torch.hypot(x, y)
        return (radius * angle.cos() - 1.05) * 0.384 + radius * angle.sin() * 0.923
    raise ValueError(f"unknown object {name!r}")


def _rgb(*c: float) -> torch.Tensor:
    return torch.tensor(c).view(3, 1, 1, 1)


def _mix(low: torch.Tensor, high: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return low + (high - low) * amount


def _blobs(x: torch.Tensor, y: torch.Tensor, px: float, py: float, sx: float, sy: float) -> torch.Tensor:
    """Soft spots of widths sx, sy on a staggered lattice of periods px, py: nothing sharp, so it can be compressed."""
    row = torch.floor(y / py)
    u = torch.remainder(x + row * px * 0.37, px) - px / 2
    v = y - (row + 0.5) * py
    return torch.exp(-0.5 * ((u / sx) ** 2 + (v / sy) ** 2))


def draw_scene(name: str, x: torch.Tensor, y: torch.Tensor, phase: tuple[float, float]) -> torch.Tensor:
    """Colours (3, F, H, W) in [0, 1] of a scene at its own coordinates x, y (F, H, W), in pixels."""
    u, v = x + phase[0], y + phase[1]
    if name == "night":
        stars = _blobs(u, v, 27, 24, 2.3, 2.3) + 0.8 * _blobs(u + 7, v + 9, 52, 43, 3.5, 3.5)
        return _mix(_rgb(0.05, 0.07, 0.22), _rgb(1.0, 0.95, 0.75), stars.clamp(max=1))
    if name == "sunset":
        sky = _mix(_rgb(0.45, 0.18, 0.45), _rgb(1.0, 0.62, 0.22), ((y + 45) / 90).clamp(0, 1))
        return _mix(sky, _rgb(1.0, 0.80, 0.62), 0.7 * _blobs(u, v, 37, 24, 8.5, 3.6))
    if name == "meadow":
        grass = 0.5 + 0.5 * torch.sin(2 * math.pi * (u + 0.3 * v) / 29)
        field = _mix(_rgb(0.22, 0.50, 0.18), _rgb(0.40, 0.68, 0.28), grass)
        return _mix(field, _rgb(0.98, 0.95, 0.70), _blobs(u, v, 31, 23, 2.8, 2.8))
    if name == "sea":
        waves = 0.5 + 0.5 * torch.sin(2 * math.pi * (v + 3.5 * torch.sin(2 * math.pi * u / 36)) / 19)
        return _mix(_rgb(0.10, 0.36, 0.60), _rgb(0.36, 0.66, 0.82), waves)
    if name == "bricks":
        row = torch.floor(v / 16)
        du = (torch.remainder(u + 14 * torch.remainder(row, 2), 28) - 14).abs()
        dv = (torch.remainder(v, 16) - 8).abs()
        mortar = torch.maximum(du - 11.0, dv - 5.0).clamp(0, 3) / 3
        return _mix(_rgb(0.62, 0.30, 0.22), _rgb(0.78, 0.66, 0.58), mortar)
    if name == "checkerboard":
        check = torch.tanh(3 * torch.sin(math.pi * u / 20) * torch.sin(math.pi * v / 20))
        return _mix(_rgb(0.36, 0.36, 0.38), _rgb(0.60, 0.60, 0.62), 0.5 + 0.5 * check)
    raise ValueError(f"unknown scene {name!r}")


def _path(clip: Clip, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The subject's place x, y, radius and angle at times 0..1, each (F,)."""
    pair = clip.relation is not None
    still = torch.zeros_like(time)
    radius = still + (PAIR if pair else SIZES.get(clip.size, 12.0))
    x, y, angle = still + clip.x, still + clip.y, still
    reach = 18.0 if pair else 24.0
    run = (time - 0.5) * reach
    if clip.action in ("left", "right"):
        x = x + (run if clip.action == "right" else -run)
    elif clip.action in ("up", "down"):
        y = y + (run if clip.action == "down" else -run)
    elif clip.action == "bounces":
        y = y + reach * (0.4 - 0.8 * torch.sin(2 * math.pi * time).abs())
    elif clip.action == "orbits":
        turn = clip.turn * 2 * math.pi * time + clip.phase[0]
        x, y = 0.5 * x + 11 * turn.cos(), 0.5 * y + 11 * turn.sin()
    elif clip.action == "spins":
        angle = clip.turn * 2.2 * time
    elif clip.action in ("grows", "shrinks"):
        small, large = (7.5, 14.0) if pair else (8.0, 20.0)
        radius = small + (large - small) * (time if clip.action == "grows" else 1 - time)
    return x, y, radius, angle


def render(clip: Clip, frame: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip's pixels (3, F, SIZE, SIZE) in [-1, 1] and its objects' mask (1, F, SIZE, SIZE) in [0, 1].

    F is FRAMES, or 1 for the one frame asked for.
    """
    time = torch.linspace(0, 1, FRAMES)
    if frame is not None:
        time = time[frame : frame + 1]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    sy, sx = torch.meshgrid(axis, axis, indexing="ij")  # screen coordinates, (H, W)
    column = lambda values: values.view(-1, 1, 1)  # (F,) beside (H, W)

    move, zoom = column(20 * (time - 0.5)), torch.ones(len(time), 1, 1)
    dx = {"pan left": -move, "pan right": move}.get(clip.camera, 0 * move)
    dy = {"tilt up": -move, "tilt down": move}.get(clip.camera, 0 * move)
    if clip.camera.startswith("zoom"):
        zoom = 1.15 - 0.5 * column(time if clip.camera == "zoom in" else 1 - time)
    moving = slice(None) if clip.camera != "static" else slice(0, 1)  # a static scene is drawn once
    image = draw_scene(clip.scene, (sx * zoom + dx)[moving], (sy * zoom + dy)[moving], clip.phase)
    image = image.expand(3, len(time), SIZE, SIZE)
    if clip.look == "neon":
        image = image * 0.4

    actors = [(clip.object, clip.colour, *_path(clip, time))]
    if clip.object2 is not None:
        here = torch.zeros(len(time))
        actors.append((clip.object2, clip.colour2, here + clip.x2, here + clip.y2, here + PAIR, here))
    mask = torch.zeros(1, len(time), SIZE, SIZE)
    edge = 4.0 if clip.look == "watercolour" else 2.0  # pixels from outside to inside
    for name, colour, x, y, radius, angle in actors:
        qx, qy, cos, sin = sx - column(x), sy - column(y), column(angle.cos()), column(angle.sin())
        radius = column(radius)
        distance = radius * signed_distance(name, (cos * qx + sin * qy) / radius, (cos * qy - sin * qx) / radius)
        paint = _rgb(*COLOURS[colour])
        if clip.look == "neon":  # a glow that falls off outside the outline
            image = _mix(image, paint, 0.75 * torch.exp(-distance.clamp(min=0) / 3.5))
        cover = (0.5 - distance / edge).clamp(0, 1)
        image, mask = _mix(image, paint, cover), torch.maximum(mask, cover)

    if clip.look == "pixel art":
        image = torch.nn.functional.avg_pool2d(image, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
    elif clip.look == "black and white":
        image = (image * _rgb(0.299, 0.587, 0.114)).sum(0, keepdim=True).expand(3, -1, -1, -1)
    elif clip.look == "watercolour":  # thinned pigment on paper, unevenly laid
        wash = 0.30 + 0.10 * torch.sin(sx / 9 + clip.phase[0]) * torch.sin(sy / 7 + clip.phase[1])
        image = _mix(image, _rgb(0.98, 0.96, 0.90), wash)
    return (image * 2 - 1).clamp(-1, 1).contiguous(), mask


def render_batch(clips: list[Clip]) -> torch.Tensor:
    """(B, 3, FRAMES, SIZE, SIZE)"""
    return torch.stack([render(clip)[0] for clip in clips])


# ---------------------------------------------------------------------------------------------------------------------
# words


def caption(clip: Clip, style: str, rng: random.Random | None = None) -> tuple[str, dict[str, str]]:
    """Words for a clip, and the factors that they name.

    style "long": every visible factor in a full sentence, and "short": the objects and what they do (the two lengths of
    the paper's Table 9); "object": the first object alone, all else left open; "train": a random few factors in either
    wording, drawn from `rng`.
    """
    seen = clip.visible()
    if style == "long":
        named, words = set(seen), 1
    elif style == "short":
        named, words = {"object", "colour", "relation", "object2", "colour2", "action"}, 0
    elif style == "object":
        named, words = {"object"}, 0
    elif style == "train":
        often = {"object": 0.92, "colour": 0.5, "size": 0.3, "action": 0.55, "relation": 0.7, "colour2": 0.5}
        often |= {"scene": 0.45, "camera": 0.3, "look": 0.35}
        named = {name for name in sorted(often) if rng.random() < often[name]}
        words = rng.randrange(2)
    else:
        raise ValueError(f"unknown caption style {style!r}")
    if "relation" in named and clip.relation:
        named |= {"object2"}
    else:
        named -= {"relation", "object2", "colour2"}
    named &= set(seen)
    names = {name: seen[name] for name in FACTORS if name in named}

    def noun(size: str, colour: str, object: str) -> list[str]:
        words = [*(names[f] for f in (size, colour) if f in names), names.get(object, "shape")]
        return ["an" if words[0] == "orange" else "a", *words]

    parts = noun("size", "colour", "object")
    for factor, phrases in (("action", ACTIONS), ("relation", RELATIONS)):
        if factor in names:
            parts.append(phrases[names[factor]][words])
    if "relation" in names:
        parts += noun("", "colour2", "object2")
    for factor, phrases in (("scene", SCENES), ("camera", CAMERAS), ("look", LOOKS)):
        if factor in names:
            parts.append(phrases[names[factor]][words])
    return " ".join(parts), names


def held_out_prompts(n: int) -> list[str]:
    """Captions, in the training style, of the first n clips that nothing is trained on."""
    return [caption(Clip.make(HELD_OUT, i), "train", random.Random(f"held out {i}"))[0] for i in range(n)]


def parse(prompt: str) -> dict[str, str]:
    """The factors that a caption of this world names: the inverse of `caption`, also for a user's own words.

    The longest phrase wins, so that "moves left" is an action and "left of" a relation. Words that are no phrase of
    the world are passed over; what stands after a relation belongs to the second object.
    """
    words, names, i = prompt.lower().replace(",", " ").replace(".", " ").split(), {}, 0
    while i < len(words):
        for length in range(min(7, len(words) - i), 0, -1):
            factor, value = _PHRASES.get(" ".join(words[i : i + length]), (None, None))
            if factor:
                second = "relation" in names and factor in ("object", "colour")
                names.setdefault(factor + "2" if second else factor, value)
                i += length - 1
                break
        i += 1
    return names


_PHRASES = {word: ("object", word) for word in OBJECTS} | {word: ("colour", word) for word in COLOURS}
_PHRASES |= {word: ("size", word) for word in SIZES}
_TABLES = {"action": ACTIONS, "relation": RELATIONS, "scene": SCENES, "camera": CAMERAS, "look": LOOKS}
_PHRASES |= {p: (factor, name) for factor, table in _TABLES.items() for name, pair in table.items() for p in pair}


def _vocabulary() -> list[str]:
    phrases = [*OBJECTS, *COLOURS, *SIZES, "a", "an", "shape"]
    for table in _TABLES.values():
        phrases += [phrase for pair in table.values() for phrase in pair]
    return sorted({word for phrase in phrases for word in phrase.split()})


WORDS = _vocabulary()
