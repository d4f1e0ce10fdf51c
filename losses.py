"""The five objectives of DOLLAR: diffusion (Eq. 4), consistency (6-7), score (10-13), latent reward (14), reward (15).

Each is a pure function of tensors. Networks come in as callables, so guidance, precision, sharding and text are the
caller's affair: a "denoiser" below is f(x_t, t) -> x_0, a "model" m(x_t, t) -> raw output. All losses are means over
elements, in float32 at least. What matters in each is whom the gradient reaches:

    conjugate_velocity_loss   the teacher, and the fake score, which must follow the student
    consistency_loss          the student: anywhere on a teacher's trajectory it should say the same x_0
    vsd_loss                  the student: KL(student || teacher) of the noised distributions
    lrm_loss, reward_loss     the latent reward model; then the student through it

Tensors are (B, ...), latents (B, C, T, H, W); t is int64 (B,), 0..999.
"""

import torch
from torch.nn.functional import mse_loss

from schedule import at_least_float32, timesteps

# LCM's constant. At a thousandth of the latents' unit scale the pseudo-Huber distance is nearly |d|: its gradient stays
# below 1 an element, so the few large errors at high noise do not drown the many small ones, and it is smooth at 0.
HUBER_C = 1e-3
# The least mean |x - x_real| that vsd_loss divides by: far below what any noised latent shows (0.03 to 0.07 at t = 20).
FLOOR = 1e-3
GRID = [-1, *reversed(timesteps(50))]  # CD's nodes -1, 19, 39, ..., 999 (section 4.1: N = 50)


def conjugate_velocity_loss(model, schedule, x0, t, eps, prediction="conjugate", weight=None):
    """Mean squared error of model(x_t, t) against x_0 - eps (Eq. 4), or the target of another prediction.

    x0, eps (B, ...), t (B,); weight of each element's error (broadcasts to x0; None: 1). Gradient reaches the model,
    and x0 if it has one: detach the student's samples.
    """
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    out = model(schedule.add_noise(x0, eps, t), t)
    error = (at_least_float32(out) - schedule.target(x0, eps, t, prediction)) ** 2
    return (error if weight is None else weight * error).mean()


def consistency_loss(student, target, teacher, schedule, x0, n, eps, m=5, loss="huber"):
    """Distance of the student at node n + m from the target at node n, m teacher steps later (Eqs. 6-7, lambda = 1).

    student, target, teacher: denoisers; only the student has gradient. The teacher is guided by who passes it (Eq. 9).
    x0, eps (B, ...), the data and its noise; n int64 (B,) in 0..N - m, on GRID, N + 1 ascending steps from -1 (x_0
    itself). loss: "huber" (pseudo-Huber, c = 0.001) or "mse". ValueError for an n outside the grid or an unknown loss.

    A consistency function needs its boundary f(x, -1) = x, or a constant would satisfy the loss. Here the grid holds
    it: where the m steps end at -1 the target is the denoised x itself, and no network. Rows of one batch may differ
    in that, so the target is always called, with t = 0 in those rows and its answer there thrown away: all ranks make
    the same calls.
    """
    grid = torch.tensor(GRID, device=x0.device)  # (N + 1,)
    if n.shape != x0.shape[:1] or not 0 <= n.min() <= n.max() < len(grid) - m or m < 1:
        raise ValueError(f"n must be ({len(x0)},), in 0..{len(grid) - 1 - m} with m = {m}: got {n.tolist()}")
    if loss not in ("huber", "mse"):
        raise ValueError(f"unknown loss {loss!r}: huber or mse")
    x0, eps, n = at_least_float32(x0), at_least_float32(eps), n.to(x0.device)
    t, t_n = grid[n + m], grid[n]  # (B,) each
    x_t = schedule.add_noise(x0, eps, t)
    with torch.no_grad():
        x_hat = x_t
        for i in range(m, 0, -1):  # Eq. 7: Denoise^m by Eq. 5 with sigma = 0
            s, s_next = grid[n + i], grid[n + i - 1]
            x_hat = schedule.ddim_step(x_hat, at_least_float32(teacher(x_hat, s)), s, s_next)
        anchored = _rows(t_n < 0, x_hat)
        goal = torch.where(anchored, x_hat, at_least_float32(target(x_hat, t_n.clamp(min=0))))
    d = at_least_float32(student(x_t, t)) - goal
    # d^2 / (sqrt(d^2 + c^2) + c) is sqrt(d^2 + c^2) - c without the cancellation near d = 0
    return (d**2 / ((d**2 + HUBER_C**2).sqrt() + HUBER_C)).mean() if loss == "huber" else (d**2).mean()


def vsd_loss(x, real, fake, schedule, t, eps, weight="dmd"):
    """A number whose gradient with respect to x is that of KL(fake || real) at noise level t (Eqs. 10-13), and info.

    x (B, ...): the student's samples, with gradient. real, fake: denoisers of the (guided) teacher and of the fake
    score, called without gradient at the same noised x. By Eq. 13 a score is -(x_t - a x_0) / b^2, so

        dKL/dx = a (s_fake - s_real) = (a^2 / b^2) (x_fake - x_real)        weight "score": x_t cancels, the first a
                                                                            is the chain rule's, x_t = a x + b eps
        g      = (x_fake - x_real) / max(mean |x - x_real|, floor)          weight "dmd": the same direction, scaled for
                                                                            each sample so that no noise level dominates

    Only the KL's gradient is known, not its value: loss = mean (x - sg(x - g))^2 / 2, whose gradient is g / numel and
    whose value says nothing of progress. A sample whose g is not finite is left out of the mean.

    info, tensors without dimensions: "dropped", the share left out; "score_gap", mean |x_fake - x_real| relative to
    mean |x - x_real|: 0 when the two scores agree. ValueError for an unknown weight.
    """
    if weight not in ("dmd", "score"):
        raise ValueError(f"unknown weight {weight!r}: dmd or score")
    x = at_least_float32(x)
    with torch.no_grad():
        x_t = schedule.add_noise(x, at_least_float32(eps), t)
        x_real, x_fake = at_least_float32(real(x_t, t)), at_least_float32(fake(x_t, t))
        gap, scale = (x_fake - x_real).abs().flatten(1).mean(1), (x - x_real).abs().flatten(1).mean(1)  # (B,) each
        if weight == "dmd":
            g = (x_fake - x_real) / _rows(scale.clamp(min=FLOOR), x)
        else:
            a, b = schedule.ab(t, x)
            g = (a**2 / b**2).to(x.device, x.dtype) * (x_fake - x_real)  # Eqs. 12-13
        kept = g.isfinite().flatten(1).all(1)  # (B,)
        gap, scale = gap.where(kept, 0).sum(), scale.where(kept, 0).sum()
        info = {"dropped": 1 - kept.double().mean(), "score_gap": gap / scale.clamp(min=FLOOR)}
    d = torch.where(_rows(kept, x), x - (x - g).detach(), 0.0)
    return 0.5 * d.square().sum() / (kept.sum().clamp(min=1) * x[0].numel()), info


def lrm_loss(lrm, x, reward, text=None):
    """Mean squared error of the latent reward model against the true reward of the decoded latents (Eq. 14).

    x (B, C, T, h, w), real and generated, detached here; reward (B,); text (B, L, D) for an LRM that reads it.
    """
    predicted = at_least_float32(lrm(x.detach()) if text is None else lrm(x.detach(), text))  # (B,)
    if predicted.shape != reward.shape:
        raise ValueError(f"the reward must be {tuple(predicted.shape)}, got {tuple(reward.shape)}")
    return mse_loss(predicted, at_least_float32(reward))


def reward_loss(lrm, x, text=None, pull=None):
    """Minus the mean reward that the latent reward model sees in x (B, C, T, h, w) (Eq. 15).

    pull (B,): the norm that each sample's gradient shall have, for rewards whose units mean nothing beside the other
    objectives; None: the reward's own.

    Gradient reaches x alone: it is taken here, and handed on by a term that is 0 and has just this slope. So one
    backward pass of the weighted sum (Eq. 16) cannot teach the LRM to please, and the LRM's activations are freed at
    once.
    """
    with torch.enable_grad():
        here = x.detach().requires_grad_()
        reward = at_least_float32(lrm(here) if text is None else lrm(here, text)).mean()
        (slope,) = torch.autograd.grad(reward, here)
        if pull is not None:
            slope = slope * _rows(pull / slope.flatten(1).norm(dim=1).clamp(min=1e-12), slope)
    return -(reward.detach() + (slope * (x - here.detach())).sum())


def _rows(c, x):
    """(B,) -> (B, 1, ..., 1), to go with x."""
    return c.reshape(-1, *[1] * (x.ndim - 1))
