"""Noise schedules, what a network may predict about them, and the samplers made of them.

A diffusion is one table of two numbers a step: x_t = a_t x_0 + b_t eps (Eq. 1). Everything else here is algebra on
that line. Given x_t, any one of x_0, eps, v = x_0 - eps or u = a eps - b x_0 gives all the others, so a network may
predict whichever it likes, and the samplers only ever speak of x_0.

    ddpm       a^2 = abar, betas linear from 1e-4 to 0.02         (the paper's "standard DDPM")
    cogvideox  a^2 = abar, betas linear in their root, SNR shifted, a_999 = 0    (CogVideoX's published weights)
    flow       a = 1 - tau, b = tau, tau = (t + 1) / 1000                        (rectified flow; a^2 + b^2 is not 1)

The paper predicts the *conjugate* velocity v = x_0 - eps (Eq. 4): x_t divided by a + b is a point of the rectified
flow, whose velocity does not change with t. At the last step of two of the schedules a is 0: only the way from eps to
x_0 divides by it, and raises an error there.

t is an int or an int64 tensor (B,), 0..999; -1 is x_0 itself (a = 1, b = 0). Coefficients are made in float64 and then
applied in the dtype of the tensors. A sub-sequence of steps is a schedule of its own: wherever the paper has alpha_t,
it is here abar_t / abar_{t_next} of the two steps actually taken, never of two neighbours among the 1000.
"""

import math

import torch

STEPS = 1000
PREDICTIONS = ("conjugate", "velocity", "epsilon", "sample")


class Schedule:
    """a_t and b_t (float64, (1000,)) of one diffusion, and the algebra on them.

    kind: "ddpm", "cogvideox" or "flow"; snr_shift: the CogVideoX family's (3.0 in 2B, 1.0 in 5B), unused by the others.
    All methods take tensors with the batch first and any dimensions after it; ValueError for a t that does not fit.
    """

    def __init__(self, kind="ddpm", snr_shift=3.0):
        if kind == "ddpm":
            betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
            self.a = torch.cumprod(1 - betas, 0).sqrt()  # Eq. 1
        elif kind == "cogvideox":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
            abar = torch.cumprod(1 - betas, 0)
            a = (abar / (snr_shift + (1 - snr_shift) * abar)).sqrt()  # SNR divided by snr_shift
            self.a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))  # zero terminal SNR: moved to end at 0, a_0 as it was
        elif kind == "flow":
            self.a = 1 - torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
        else:
            raise ValueError(f"unknown schedule {kind!r}: one of ddpm, cogvideox, flow")
        self.b = 1 - self.a if kind == "flow" else (1 - self.a**2).sqrt()
        table = torch.stack([torch.cat([self.a.new_tensor([1.0]), self.a]), torch.cat([self.b.new_zeros(1), self.b])])
        self._tables = {torch.device("cpu"): table}  # (2, 1001) a device; column 0 is t = -1

    def ab(self, t, x):
        """float64 a_t, b_t that broadcast against x: without dimensions for an int, else (B, 1, ..., 1)."""
        if isinstance(t, int):
            if not -1 <= t < STEPS:
                raise ValueError(f"t = {t} is outside -1..{STEPS - 1}")
            return self._tables[torch.device("cpu")][:, t + 1].unbind(0)
        if not torch.is_tensor(t) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be an int or an int64 tensor ({x.shape[0]},), got {getattr(t, 'shape', t)}")
        if t.device.type == "cpu" and ((t < -1) | (t >= STEPS)).any():
            raise ValueError(f"t is outside -1..{STEPS - 1}: {t.tolist()}")
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        ab = self._tables[t.device].index_select(1, t + 1)  # (2, B); unlike [], it refuses a t below -1 on a GPU too
        return ab.reshape(2, -1, *[1] * (x.ndim - 1)).unbind(0)

    def add_noise(self, x0, eps, t):
        """x_t = a x_0 + b eps (Eq. 1)."""
        a, b = self.ab(t, x0)
        return _in(a, x0) * x0 + _in(b, x0) * eps

    def target(self, x0, eps, t, prediction):
        """What a network of this prediction should put out."""
        a, b = self.ab(t, x0)
        if prediction == "conjugate":
            return x0 - eps  # Eq. 4
        if prediction == "velocity":
            return _in(a, x0) * eps - _in(b, x0) * x0  # Eq. 3
        return {"epsilon": eps, "sample": x0}[_known(prediction)]

    def to_x0(self, pred, x_t, t, prediction):
        """x_0 from what the network put out at x_t (Eq. 8 for "conjugate"). ValueError for "epsilon" where a = 0."""
        a, b = self.ab(t, x_t)
        if _known(prediction) == "conjugate":
            return _in(1 / (a + b), x_t) * x_t + _in(b / (a + b), x_t) * pred  # Eq. 8
        if prediction == "velocity":
            return _in(a / (a**2 + b**2), x_t) * x_t - _in(b / (a**2 + b**2), x_t) * pred
        if prediction == "epsilon":
            _positive(a, "x_0 cannot be had from eps where a = 0 (pure noise): predict conjugate, velocity or sample")
            return (x_t - _in(b, x_t) * pred) / _in(a, x_t)  # Eq. 20
        return pred

    def to_eps(self, pred, x_t, t, prediction):
        """eps from what the network put out at x_t. ValueError for "sample" where b = 0 (t = -1)."""
        a, b = self.ab(t, x_t)
        if _known(prediction) == "conjugate":
            return _in(1 / (a + b), x_t) * x_t - _in(a / (a + b), x_t) * pred
        if prediction == "velocity":
            return _in(b / (a**2 + b**2), x_t) * x_t + _in(a / (a**2 + b**2), x_t) * pred
        if prediction == "sample":
            _positive(b, "eps cannot be had from x_0 where b = 0: t = -1 has no noise")
            return (x_t - _in(a, x_t) * pred) / _in(b, x_t)
        return pred

    def ddim_step(self, x_t, x0, t, t_next, eta=0.0, noise=None):
        """One step of Eq. 5 from t to t_next < t (-1: x_0 itself), in any schedule and over any distance.

        x_next = a' x_0 + sqrt(b'^2 - sigma^2) eps + sigma noise, sigma = eta times the std of the posterior of Eq. 27.
        The paper prints the last line of its proof without - sigma^2 in the coefficient of x_t; the line above it has
        it, and only with it does x_next have the variance b'^2 of its step. noise: standard normal, where sigma > 0.
        ValueError for eta outside 0..1, a missing noise, or t_next not before t.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta lies in 0..1, got {eta}")
        a_next, b_next = self.ab(t_next, x_t)
        _, _, std = self._posterior(x_t, t, t_next)
        sigma = eta * std
        eps = self.to_eps(x0, x_t, t, "sample")
        x = _in(a_next, x_t) * x0 + _in((b_next**2 - sigma**2).clamp(min=0).sqrt(), x_t) * eps
        if eta == 0 or (noise is None and not sigma.any()):
            return x
        if noise is None:
            raise ValueError(f"eta = {eta} needs noise")
        return x + _in(sigma, x_t) * noise

    def posterior(self, x_t, x0, t, t_next):
        """mean (like x_t) and std (broadcasts against it) of q(x_next | x_t, x_0), t_next < t. std = 0 for t_next = -1.

        Eq. 27, in any schedule. Its mean is printed with sqrt(abar_t) in both coefficients, where sqrt(abar_{t-1})
        before x_0 and sqrt(alpha_t) before x_t belong.
        """
        on_x0, on_x_t, std = self._posterior(x_t, t, t_next)
        return _in(on_x0, x_t) * x0 + _in(on_x_t, x_t) * x_t, _in(std, x_t)

    def _posterior(self, x, t, t_next):
        """float64 coefficients of x_0 and x_t in the posterior's mean, and its std."""
        (a, b), (a_next, b_next) = self.ab(t, x), self.ab(t_next, x)
        if not torch.as_tensor(t_next < t).all():
            raise ValueError(f"t_next = {t_next} must lie before t = {t}")
        r = a / a_next  # x_t = r x_next + sqrt(var) noise; a_next > 0, as only the very last a may be 0
        var = (b**2 - r**2 * b_next**2).clamp(min=0)
        return a_next * var / b**2, r * b_next**2 / b**2, var.sqrt() * b_next / b


def _in(c, x):
    """A float64 coefficient in x's dtype; one without dimensions may stay on the CPU: it takes x's dtype by itself."""
    return c if c.ndim == 0 else c.to(x.device, x.dtype)


def _positive(c, message):
    if not (c > 0).all():
        raise ValueError(message)


def _known(prediction):
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}: one of {', '.join(PREDICTIONS)}")
    return prediction


def guide(v_cond, v_uncond, w):
    """Classifier-free guidance as the paper writes it (Eq. 9): w = 0 is the conditional prediction alone, w = -1 the
    unconditional one. The `guidance_scale` of other codebases is 1 + w."""
    return v_cond + w * (v_cond - v_uncond)


def timesteps(n):
    """n steps from 999 down, evenly apart, "trailing": 50 -> 999, 979, ..., 19; 4 -> 999, 749, 499, 249; 1 -> 999."""
    if not 1 <= n <= STEPS:
        raise ValueError(f"the number of steps lies in 1..{STEPS}, got {n}")
    return [round(STEPS - i * STEPS / n) - 1 for i in range(n)]


def denoise(model, schedule, x_t, t, text, prediction, w=0.0, null=None):
    """x_0 as the network sees it: x_t (B, C, T, H, W), text (B, L, D) -> (B, C, T, H, W), float32 (float64 stays).

    model(x_t, t, text) is called once. For w != 0 the batch is doubled, its second half with null, the encoded empty
    prompt, (1, L, D) or (B, L, D). Guidance acts on the raw output (Eq. 9), before it becomes x_0 (Eq. 8).
    """
    ts = torch.full(x_t.shape[:1], t, device=x_t.device) if isinstance(t, int) else t  # (B,)
    if w == 0:
        out = at_least_float32(model(x_t, ts, text))
    elif null is None:
        raise ValueError("guidance (w != 0) needs null, the encoded empty prompt")
    else:
        both = torch.cat([text, null.expand_as(text)])  # (2B, L, D)
        out = guide(*at_least_float32(model(torch.cat([x_t, x_t]), torch.cat([ts, ts]), both)).chunk(2), w)
    return schedule.to_x0(out, at_least_float32(x_t), t, prediction)


def denoiser(model, schedule, text, w=0.0, null=None):
    """A network as the losses and samplers want it: f(x_t, t) -> x_0; with w, guided (Eq. 9)."""
    return lambda x_t, t: denoise(model, schedule, x_t, t, text, model.config.prediction, w, null)


def at_least_float32(x):
    """x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# The samplers take the network as predict(x_t, t) -> x_0, t int64 (B,): whether it is guided, in bf16, a teacher or a
# student is the caller's affair. They call it once a step. noise(i) is the standard normal tensor spent on leaving step
# i, so that the caller decides on seeds. Only simulate turns gradients off by itself.


def ddim(predict, schedule, x, steps):
    """DDIM (Eq. 5 with sigma = 0) from x at steps[0] through the descending steps to x_0."""
    return few_step(predict, schedule, x, steps, None, "ddim")


def few_step(predict, schedule, x, steps, noise, transition="renoise"):
    """The student's sampler: x at steps[0] -> x_0 after len(steps) calls; gradient flows through the last one alone."""
    x = simulate(predict, schedule, x, steps, len(steps) - 1, noise, transition)
    return predict(x, torch.full(x.shape[:1], steps[-1], device=x.device))


@torch.no_grad()
def simulate(predict, schedule, x, steps, k, noise, transition="renoise"):
    """What the student sees at its step k (0..len(steps) - 1) when it samples: x_t, after k calls without gradient.

    "renoise": predict x_0 and noise it afresh to the next step; "ddim": go there by Eq. 5 with sigma = 0, no noise.
    """
    if transition not in ("renoise", "ddim") or not 0 <= k < len(steps):
        raise ValueError(f"step {k} of {len(steps)}, transition {transition!r}: 0..{len(steps) - 1}, renoise or ddim")
    for i, (t, t_next) in enumerate(zip(_descending(steps)[:k], steps[1:])):
        x0 = predict(x, torch.full(x.shape[:1], t, device=x.device))
        x = schedule.ddim_step(x, x0, t, t_next) if transition == "ddim" else schedule.add_noise(x0, noise(i), t_next)
    return x


def _descending(steps):
    if any(t >= s for s, t in zip([STEPS, *steps], [*steps, -1])) or len(steps) == 0:
        raise ValueError(f"steps must descend within 0..{STEPS - 1}, got {list(steps)}")
    return steps


def log_prob(x, mean, std):
    """log N(x; mean, std^2) of every element, in nats (Eq. 28). ValueError for std = 0: a point has no density."""
    _positive(std, "std must be above 0: the step that ends at x_0 has no log-probability")
    return -0.5 * ((x - mean) / std) ** 2 - _in(std.log(), x) - 0.5 * math.log(2 * math.pi)
