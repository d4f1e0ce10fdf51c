"""Weights that know what they are: from prompts and seeds to latents to video, for whoever wants to look at a model.

A file of weights says of itself whether it is a teacher or a student. A teacher is sampled by guided DDIM at any number
of steps, two evaluations each (Eq. 5, 9); a student without guidance, one evaluation each, at the steps it was trained
for or a subset of them. All noise of a video comes from that video's own seed, so a video does not depend on what else
is in its batch, nor its first noise on the number of steps: models and step counts are compared on the same noise.
"""

from dataclasses import asdict
from pathlib import Path

import torch

import common
from adapters import Adapted
from cogvideox import below, load_dit, load_vae_of, read_dit_about
from common import UserError, autocast, uses_bfloat16
from data import fingerprint
from dit import DiT
from schedule import Schedule, ddim, denoiser, few_step, timesteps
from text import load_encoder

BUNDLED = Path(__file__).parent / "weights"
# The most numbers of latents that `draw` decodes at a time: 68 clips of the small world, one of CogVideoX, whose
# decoding takes 10 GiB.
DECODED = 2**18


class Generator:
    """A text-to-video model: transformer, its schedule, its text encoder and its VAE.

    model: a DiT; vae: a VAE3D, both on `device`; about: the metadata of the model's file; encoder: of text.py;
    precision: of common.py.
    """

    def __init__(self, model, vae, about, encoder, device="cpu", precision="auto"):
        self.config, self.about, self.device, self.precision = model.config, about, device, precision
        self.model, self.vae = model, vae
        self.schedule = Schedule(self.config.schedule, self.config.snr_shift)
        self.encoder = encoder
        self.null = self.encoder.encode([""]).to(device)  # (1, L, D)

    @classmethod
    def load(cls, weights, vae="", device="cpu", text="", precision="auto", adapter=""):
        """The model in a file of weights, or in a CogVideoX folder of diffusers with its own VAE and T5.

        adapter: file of a student's adapters on these weights, as train.py --rank writes it.
        vae: file or folder, text: folder of a T5 encoder (default: the weights' own folder, for a file of weights the
        small world's); precision: of common.py; published weights stay in half precision where the device computes in
        bfloat16. Raises UserError where a part is missing or does not fit.
        """
        base, about = load_network(weights)
        model, half = base, uses_bfloat16(precision, device)
        if adapter:
            model, about = add_adapters(base, adapter, weights)
        c = model.config
        if not vae and Path(weights).is_dir() and not Path(weights, "vae").is_dir():
            raise UserError(f"{weights} has no VAE: name one with --vae, and a text encoder with --text")
        place = vae or (weights if Path(weights).is_dir() else BUNDLED / "vae.safetensors")
        coder = load_vae_of(weights, c, place, precision, device)
        text = text or (weights if Path(weights).is_dir() else "words")
        encoder = load_encoder(text, c.text_dim, c.text_length, device, precision)
        if encoder.dim != c.text_dim or about.get("text_fingerprint", encoder.fingerprint) != encoder.fingerprint:
            raise UserError(f"{weights} was trained with another text encoder: name it with --text FOLDER")
        if not half:
            base.float()
        elif base.patch_in.weight.dtype == torch.float16:  # which autocast to bfloat16 refuses
            base.bfloat16()
        base.to(device).eval()
        return cls(model.to(device).eval(), coder, about, encoder, device, precision)

    @property
    def student(self):
        return self.about.get("kind") == "student"

    @property
    def trained(self):
        """The steps that a student was trained at."""
        return self.about.get("timesteps") or timesteps(4)

    @property
    def shape(self):
        """Of a video's latents: (C, T, h, w)."""
        return self.config.channels, *(self.about.get("latents") or self.config.latents)

    def steps(self, n):
        """The list of n time steps. UserError where n is impossible, or not among those a student was trained for."""
        if not 1 <= n <= 1000:
            raise UserError(f"the number of steps lies in 1..1000, not {n}")
        if not self.student:
            return timesteps(n)
        steps = self.trained if n == len(self.trained) else timesteps(n)
        if not set(steps) <= set(self.trained):
            raise UserError(f"this student samples in the steps {self.trained} or some of them, not in {n}: {steps}")
        return steps

    def guidance(self, w=None):
        """The w of Eq. 9 that is used: none for a student; for a teacher the one asked for, its own, or 2."""
        return 0.0 if self.student else float(w if w is not None else self.about.get("w", 2.0))

    def evaluations(self, n, w=None):
        """Network evaluations a video in n steps: guidance doubles them."""
        return n * (2 if self.guidance(w) else 1)

    @torch.no_grad()
    def latents(self, text, seeds, n, w=None):
        """text (B, L, D), a seed a video, n steps -> latents (B, C, T, h, w), float32."""
        w = self.guidance(w)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(step=None):  # of the start, or on leaving a step
            return torch.stack([torch.randn(self.shape, generator=g) for g in sources]).to(self.device)

        predict = denoiser(self.model, self.schedule, text.to(self.device), w, self.null)
        with autocast(self.precision, self.device):
            if self.student:
                transition = self.about.get("transition", "renoise")
                return few_step(predict, self.schedule, noise(), self.steps(n), noise, transition)
            return ddim(predict, self.schedule, noise(), self.steps(n))

    def decode(self, latents):
        """Latents (B, C, T, h, w) -> video (B, 3, F, H, W), float32, clamped to [-1, 1]; with gradient if they have."""
        with autocast(self.precision, self.device):
            return self.vae.decode(latents).clamp(-1, 1)

    @torch.no_grad()
    def draw(self, prompts, seeds, n, w=None):
        """Prompts, a seed each, n steps -> videos (B, 3, F, H, W) on the CPU."""
        latents = self.latents(self.encoder.encode(prompts), seeds, n, w)
        at_once = max(1, DECODED // latents[0].numel())
        return torch.cat([self.decode(part).cpu() for part in latents.split(at_once)])


def load_network(weights):
    """-> (DiT, what is said of it) of a file of weights or of a CogVideoX folder of diffusers. Raises UserError."""
    if not Path(weights).is_dir():
        return common.load_model(weights, DiT)
    folder = below(weights, "transformer")
    return load_dit(folder), read_dit_about(folder)


def save_adapters(file, weights, base, **about):
    """Write a student's adapters (an Adapted's state dict) with the identity of their base, a DiT, and `about` them."""
    about |= {"class": "Adapted", "config": asdict(base.config), "base": fingerprint(base, torch.bfloat16)}
    common.save_tensors(file, {name: p.half() for name, p in weights.items()}, about)


def check_base(about, base, file, weights):
    """UserError where adapters, by `about` in their file, were not trained on the DiT `base`, called `weights`."""
    if about.get("base") != fingerprint(base, torch.bfloat16):
        raise UserError(f"{file} holds adapters of other weights than {weights}: name the teacher of their run")


def add_adapters(base, file, weights):
    """-> (the student that a file of adapters makes of a DiT, what the file says of it). weights: the base's name.

    They are not merged: a base in bfloat16 would lose what is small in them.
    """
    about = common.read_metadata(file, "Adapted")
    check_base(about, base, file, weights)
    model = Adapted(base, about["rank"])
    model.load_state_dict(common.load_tensors(file)[0])
    return model, about
