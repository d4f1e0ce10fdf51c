"""Watching a reward while it is optimised: what it says of fresh samples, and when it stops being what is learned.

While tuning, the student is judged by a latent reward model that learns beside it (Eq. 14-15), on the samples it trains
on. Whether that is worth anything shows elsewhere: on the samples a user would draw, in all steps, from noise that
training never sees, decoded and scored by the true reward. In the small world the prompts are held out too; elsewhere
they are some of those at hand. Prompts and noise are the same each time, so that what changes is the student.

rank_correlation is Spearman's, of the LRM's estimates and the true rewards of these samples: 1 if it puts them in the
right order. Its gradient needs more than that: a prompt's samples in the right order. An LRM that knows only which
prompts are hard has a high correlation and nothing to teach, so rank_correlation_within is that of the deviations from
each prompt's mean. Over-optimisation (section 4.5) has two signs here. What the LRM thinks of the samples rises while
what is true of them falls: the student has found what the LRM is wrong about. Or, where the LRM keeps learning and so
is not wrong for long, it no longer tells better samples from worse: the student has left what it knows, or has made its
samples all alike, and follows noise.
"""

import math

import torch

import distributed
from evals.metrics import mean_error

REPEATS = 2  # samples of a prompt
SEED = 77_000_000  # of the samples' noise, far from those of pictures and evaluation
WINDOW = 3  # measurements that are averaged before they are compared
BLIND = 0.2  # a rank correlation: by chance alone 64 samples have 0.13, a mean over 3 measurements of them hardly less


def placings(x):
    """The ranks 1..n of x (n,); equal values share the mean of their ranks."""
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[which].double()


def spearman(a, b):
    """Spearman's rank correlation of a and b (n,), -1..1; NaN where one of them is constant or not finite."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    if len(a) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    a, b = placings(a), placings(b)
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()


def within(x):
    """Of samples (n,), REPEATS of a prompt one after the other, the deviations from each prompt's mean."""
    return torch.cat([part - part.mean() for part in x.split(REPEATS)])


@torch.no_grad()
def measure(generator, reward, prompts, n, samples, batch, ranks, latent=None):
    """The true reward of fresh samples in n steps, and what the LRM says of them, alike on all ranks.

    generator: of generate.py; reward: of rewards.py; latent: the LatentReward of lrm.py that learns it, or None.
    Each prompt is drawn REPEATS times (after the last they begin anew), each sample from noise of its own.
    -> {"true_reward", "true_error" (a standard error, over prompts)}, in the reward's own units; with an LRM also
    "lrm_estimate", "rank_correlation" and "rank_correlation_within" prompts.
    """
    per_rank, rows = -(-samples // ranks.size), []  # all ranks make the same number of calls
    numbers = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
    for part in (numbers[i : i + batch] for i in range(0, per_rank, batch)):
        captions = [prompts[i // REPEATS % len(prompts)] for i in part]
        text = generator.encoder.encode(captions).to(generator.device)
        x = generator.latents(text, [SEED + i for i in part], n)
        scores = reward(generator.decode(x), captions).double().cpu()  # (B,)
        estimates = latent.estimate(x, text, captions).double().cpu() if latent else torch.zeros_like(scores)
        rows += torch.stack([estimates, scores], 1).tolist()
    rows = [row for part in distributed.every(rows, ranks) for row in part]
    estimates, true = torch.tensor(rows[:samples], dtype=torch.float64).T  # (n,) each
    by_prompt = torch.stack([part.mean() for part in true.split(REPEATS)])
    found = {"true_reward": true.mean().item(), "true_error": mean_error(by_prompt)["error"]}
    if latent:
        found["lrm_estimate"] = latent.moments.natural(estimates).mean().item()
        found["rank_correlation"] = spearman(estimates, true)
        found["rank_correlation_within"] = spearman(within(estimates), within(true))
    return found


def overoptimised(history):
    """Which sign of over-optimisation the last measurements show, in words; "" if none.

    history: what `measure` has found, oldest first. The mean of the last WINDOW measurements is compared with that of
    the WINDOW before them, since a single one is noisy; with fewer there is no verdict yet.
    """
    if len(history) < 2 * WINDOW:
        return ""

    def mean(name, part):
        return sum(found[name] for found in part) / WINDOW

    def correlation(part):
        # samples of one and the same reward have no order (NaN): the LRM tells none of them from the others
        return sum(r for found in part if math.isfinite(r := found["rank_correlation"])) / WINDOW

    before, after = history[-2 * WINDOW : -WINDOW], history[-WINDOW:]
    rise = mean("lrm_estimate", after) - mean("lrm_estimate", before)
    fall = mean("true_reward", before) - mean("true_reward", after)
    if rise > 0 and fall > mean("true_error", after):
        return "the LRM's estimate rises while the true reward falls"
    if correlation(before) > BLIND > correlation(after):
        return "the LRM no longer tells better samples from worse"
    return ""
