"""Weights that know what they are: from prompts and seeds to latents to video, for whoever wants to look at a model.

A file of weights says of itself whether it is a teacher or a student. A teacher is sampled by guided DDIM at any number
of steps, two evaluations each (Eq. 5, 9); a student without guidance, one evaluation each, at the steps it was trained
for or a subset of them. All noise of a video comes from that video's own seed, so a video does not depend on what else
is in its batch, nor its first noise on the number of steps: models and step counts are compared on the same noise.
"""

import torch

import checkpoint
import shapes
from cli import UserError
from dit import DiT
from schedule import Schedule, ddim, denoise, few_step, timesteps
from text import WordTable
from vae3d import VAE3D


class Generator:
    """A text-to-video model: transformer, its schedule, its text encoder and its VAE.

    model: a DiT; vae: a VAE3D; about: the metadata of the model's file; encoder: of text.py (default: the word table).
    """

    def __init__(self, model, vae, about, encoder=None, device="cpu"):
        self.config, self.about, self.device = model.config, about, device
        self.model, self.vae = model.to(device), vae.to(device, memory_format=torch.channels_last_3d)
        self.schedule = Schedule(self.config.schedule, self.config.snr_shift)
        self.encoder = encoder or WordTable(shapes.WORDS, self.config.text_dim, self.config.text_length)
        self.null = self.encoder.encode([""]).to(device)  # (1, L, D)

    @classmethod
    def load(cls, weights, vae, device="cpu"):
        """From two files of weights. Raises UserError where one cannot be read or the two do not fit together."""
        model, about = checkpoint.load_model(weights, DiT, device)
        vae, _ = checkpoint.load_model(vae, VAE3D, device)
        if model.config.channels != vae.config.latent_channels:
            raise UserError(
                f"{weights} draws latents of {model.config.channels} channels, but the VAE has "
                f"{vae.config.latent_channels}: name the VAE it was trained on with --vae"
            )
        return cls(model, vae, about, device=device)

    @property
    def student(self):
        return self.about.get("kind") == "student"

    def steps(self, n):
        """The list of n time steps. UserError where n is impossible, or not among those a student was trained for."""
        if n < 1 or n > 1000:
            raise UserError(f"the number of steps lies in 1..1000, not {n}")
        if not self.student:
            return timesteps(n)
        trained = self.about.get("timesteps") or timesteps(4)
        steps = trained if n == len(trained) else timesteps(n)
        if not set(steps) <= set(trained):
            some = [k for k in range(1, len(trained) + 1) if k == len(trained) or set(timesteps(k)) <= set(trained)]
            raise UserError(f"this student samples in {', '.join(map(str, some))} steps (of {trained}), not in {n}")
        return steps

    def guidance(self, w=None):
        """The w of Eq. 9 that is used: none for a student; for a teacher the one asked for, its own, or 2."""
        return 0.0 if self.student else float(w if w is not None else self.about.get("w", 2.0))

    def evaluations(self, n, w=None):
        """Network evaluations a video in n steps: guidance doubles them."""
        return n * (2 if self.guidance(w) else 1)

    @torch.no_grad()
    def latents(self, text, seeds, n, w=None, autocast=True):
        """text (B, L, D), a seed a video, n steps -> latents (B, C, T, h, w), float32."""
        w, shape = self.guidance(w), (self.config.channels, *self.config.latents)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = lambda i=None: torch.stack([torch.randn(shape, generator=g) for g in sources]).to(self.device)
        text = text.to(self.device)

        def predict(x, t):
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
                return denoise(self.model, self.schedule, x, t, text, self.config.prediction, w, self.null)

        if self.student:
            transition = self.about.get("transition", "renoise")
            return few_step(predict, self.schedule, noise(), self.steps(n), noise, transition)
        return ddim(predict, self.schedule, noise(), self.steps(n))

    @torch.no_grad()
    def decode(self, latents, autocast=True):
        """Latents (B, C, T, h, w) -> video (B, 3, F, H, W), float32, clamped to [-1, 1]."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
            return self.vae.decode(latents).float().clamp(-1, 1)
