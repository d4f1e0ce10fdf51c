"""watch.py: rank correlation against SciPy's definition, measuring against closed forms, the verdict."""

import math
from types import SimpleNamespace

import pytest
import torch

import rewards
from distributed import Ranks
from evals import watch

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_spearman():
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert watch.spearman(x, x**3) == pytest.approx(1) and watch.spearman(x, -x.exp()) == pytest.approx(-1)
    y = x + torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = x.argsort().argsort() - y.argsort().argsort()  # without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert watch.spearman(x, y) == pytest.approx(1 - 6 * d.square().sum().item() / (50 * (50**2 - 1)))
    assert watch.placings(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, sums of squares 4.5 and 5
    assert watch.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(watch.spearman([1, 1, 1], [1, 2, 3])) and math.isnan(watch.spearman([1, math.nan], [1, 2]))


class Drawn:
    """A generator whose clip of seed s is s - SEED everywhere."""

    device = "cpu"
    encoder = SimpleNamespace(encode=lambda words: torch.tensor([[[float(len(w))]] for w in words]))

    def latents(self, text, seeds, n):
        self.seen = getattr(self, "seen", []) + list(zip(seeds, text[:, 0, 0].tolist()))
        return torch.tensor([float(s - watch.SEED) for s in seeds]).view(-1, 1, 1, 1, 1)

    def decode(self, x):
        return x.expand(-1, 3, 2, 4, 4)


def bright():
    return rewards.Reward("bright", lambda v, p: v.mean((1, 2, 3, 4)), True, False, None, "cpu")


def test_measure():
    moments = rewards.Moments()
    moments.update(torch.tensor([0.0, 4.0]), ALONE)  # mean 2, deviation 2
    drawn, latent = Drawn(), SimpleNamespace(estimate=lambda x, *_: -(x[:, 0, 0, 0, 0] ** 3), moments=moments)
    found = watch.measure(drawn, bright(), ["a", "bbb"], 4, 5, 2, ALONE, latent)
    assert drawn.seen == [(watch.SEED + i, [1, 1, 3, 3, 1][i]) for i in range(5)]  # two of each prompt, then anew
    of_prompts = torch.tensor([0.5, 2.5, 4.0]).std().item() / 3**0.5
    assert found["true_reward"] == pytest.approx(2) and found["true_error"] == pytest.approx(of_prompts)
    assert found["lrm_estimate"] == pytest.approx(2 * -(0 + 1 + 8 + 27 + 64) / 5 + 2)
    assert found["rank_correlation"] == pytest.approx(-1) and set(found) >= {"lrm_estimate"}
    plain = watch.measure(Drawn(), bright(), ["a"], 4, 5, 2, ALONE)
    assert plain == {k: found[k] for k in ("true_reward", "true_error")}


def test_an_lrm_that_knows_only_the_prompts_has_no_correlation_within_them():
    moments = rewards.Moments(2, 0.0, 2.0)
    for estimates, within in (([1.0, 0, 3, 2], -1), ([0.0, 1, 2, 3], 1), ([5.0, 5, 7, 7], math.nan)):
        estimate = lambda *_, estimates=estimates: torch.tensor(estimates)
        drawn, latent = Drawn(), SimpleNamespace(estimate=estimate, moments=moments)
        found = watch.measure(drawn, bright(), ["a", "bbb"], 4, 4, 4, ALONE, latent)
        assert [n for _, n in drawn.seen] == [1, 1, 3, 3]
        assert found["rank_correlation"] > 0.5
        assert found["rank_correlation_within"] == pytest.approx(within, nan_ok=True)


def history(estimates, truths, error=0.01, correlations=None):
    return [
        {"lrm_estimate": e, "true_reward": t, "true_error": error, "rank_correlation": r, "step": i}
        for i, (e, t, r) in enumerate(zip(estimates, truths, correlations or [0.0] * len(truths)))
    ]


def test_overoptimised_is_when_the_estimate_rises_and_the_truth_falls():
    rising, falling = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert watch.overoptimised(history(rising, falling))
    assert not watch.overoptimised(history(rising, rising))
    assert not watch.overoptimised(history(falling, falling))  # both fall: the student is lost, not the LRM deceived
    assert not watch.overoptimised(history(falling, rising))
    assert not watch.overoptimised(history(rising[:5], falling[:5]))  # too early to say
    assert watch.overoptimised(history([9.0, *rising], [-9.0, *falling]))  # what is long past does not count
    assert not watch.overoptimised(history(rising, falling, error=0.31))  # the fall is 0.3, within its error
    assert watch.overoptimised(history(rising, falling, error=0.29))
    noisy = [0.5, 0.1, 0.4, 0.45, 0.5, 0.05]  # the last is the lowest, the windows are alike
    assert not watch.overoptimised(history(rising, noisy, error=0.01))


def test_overoptimised_is_when_the_lrm_goes_blind():
    rising = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    said = lambda *correlations: watch.overoptimised(history(rising, rising, correlations=correlations))
    assert "no longer tells" in said(0.8, 0.7, 0.6, 0.3, 0.0, -0.3)
    assert not said(0.8, 0.7, 0.6, 0.6, 0.1, 0.0)  # 0.23 on average: still something
    assert not said(0.1, 0.2, 0.0, 0.1, 0.0, 0.1)  # it has never known anything
    assert said(0.8, 0.7, 0.6, 0.0, 0.0, math.nan)  # samples of one and the same reward have no order
    assert said(0.8, 0.7, 0.6, math.nan, math.nan, math.nan) and not said(0.8, 0.7, 0.6, 0.9, 0.9, math.nan)
