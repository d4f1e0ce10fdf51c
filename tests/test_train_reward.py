"""Reward tuning in train.py: of a student, of a distilled one; LRMs that come from a file; budgets."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import config, fit

import common
import nets
import rewards
import train
from common import UserError
from distributed import Ranks
from evals import watch
from lrm import Buffer, VideoLRM
from rewards import Moments
from world.shapes import FACTORS

ALONE = Ranks(0, 1, torch.device("cpu"))

JPEG = {"reward": "jpeg_compressibility", "reward_samples": 4, "reward_every": 2, "batch": 2, "global_batch": 2}
JPEG |= {"lrm_warmup": 0}


@pytest.fixture(scope="module")
def distilled(tiny, tmp_path_factory):
    """A run with an LRM: its folder."""
    out = tmp_path_factory.mktemp("distilled")
    fit(config(tiny, out, **JPEG | {"iterations": 2, "lr": 1e-2, "ema": 0.0}))
    return out


def test_the_reward_is_measured_on_fresh_samples(tiny, distilled):
    lines = [json.loads(line) for line in (distilled / "log.jsonl").read_text().splitlines()]
    assert all({"true_reward", "true_error", "lrm_estimate", "rank_correlation_within"} <= set(line) for line in lines)
    assert lines[-1]["reward_evaluations"] == 2 * 2 * 2  # iterations, real and generated, clips


def test_with_a_reward_an_update_sums_seven_small_forwards(tiny, tmp_path):
    """Section 4.1; each clip, real and generated, is scored once. From 16 clips a forward on, one is an update."""
    for batch, clips in ((1, 7), (16, 16)):
        small = {"batch": batch, "global_batch": 0, "iterations": 1}
        *_, lines = fit(config(tiny, tmp_path / str(batch), **JPEG | small))
        assert lines[0]["reward_evaluations"] == 2 * clips


def test_tuning_goes_on_from_a_student(tiny, distilled, tmp_path):
    """Where nothing is learned, what comes out is what went in."""
    began = str(distilled / "student.safetensors")
    still = {"lr": 0.0, "iterations": 1, "beta_kl": 1.0, "fake_warmup": 0}
    out, about, lines = fit(config(tiny, tmp_path / "a", **JPEG | still, student=began))
    before, _ = common.load_tensors(began)
    assert all(torch.equal(out[k], before[k]) for k in before) and about["kind"] == "student"
    assert lines[0]["kl"] == 0 and "ft" in lines[0] and "rank_correlation" in lines[0]


def test_kl_is_the_distance_to_the_student_as_it_began(tiny, distilled, tmp_path):
    """Against the teacher where it began as the teacher; with much of it, the student stays nearer."""
    moved = {}
    for beta in (0.1, 100.0):
        reward = JPEG | {
            "iterations": 3,
            "beta_kl": beta,
            "lr": 1e-3,
            "beta_vsd": 0.0,
            "beta_cd": 0.0,
        }
        *_, lines = fit(config(tiny, tmp_path / str(beta), **reward, student=str(distilled / "student.safetensors")))
        assert lines[0]["kl"] == 0 and lines[1]["kl"] > 0
        moved[beta] = lines[2]["kl"] / beta
    assert moved[100.0] < moved[0.1]
    *_, lines = fit(config(tiny, tmp_path / "c", **JPEG | {"iterations": 2, "beta_kl": 1.0, "lr": 1e-2, "ema": 0.0}))
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 0


def test_kl_alone_moves_nothing(tiny, distilled, tmp_path):
    """While the LRM warms up the KL is 0 but for rounding, of which AdamW would make full steps."""
    still = {"beta_vsd": 0.0, "beta_cd": 0.0, "beta_kl": 1.0, "lrm_warmup": 3, "precision": "bf16"}
    began = str(distilled / "student.safetensors")
    out, *_ = fit(config(tiny, tmp_path, **JPEG | still | {"iterations": 3}, student=began))
    before, _ = common.load_tensors(began)
    assert all(torch.equal(out[k], before[k]) for k in before)


def test_an_lrm_that_learns_alone_leaves_the_student_as_it_is(tiny, distilled, tmp_path):
    """Neither a gradient of zeros nor the optimizer's weight decay."""
    alone = JPEG | {"beta_vsd": 0.0, "beta_cd": 0.0, "beta_ft": 0.0, "iterations": 2, "lr": 1e-2}
    out, _, lines = fit(config(tiny, tmp_path, **alone, student=(began := str(distilled / "student.safetensors"))))
    before, _ = common.load_tensors(began)
    assert all(torch.equal(out[k], before[k]) for k in before) and lines[0]["lrm"] > 0 and "ft" not in lines[0]


def test_an_lrm_of_3d_convolutions_learns_too(tiny, tmp_path):
    *_, lines = fit(config(tiny, tmp_path, iterations=2, lrm_backbone="3d", **JPEG))
    assert lines[-1]["reward_evaluations"] == 8 and lines[0]["lrm"] > 0 and "true_reward" in lines[-1]


def test_overoptimisation_is_said_once(tiny, tmp_path, monkeypatch, capsys):
    found = iter(
        [(0.0, math.nan), (0.0, 0.0), (0.5, 1.0)]  # what is not finite is never the best
        + [(0.1 * i, -i) for i in range(20)]
    )
    fake = lambda *_: dict(zip(("lrm_estimate", "true_reward"), next(found)), true_error=0.1, rank_correlation=0.0)
    monkeypatch.setattr(watch, "measure", fake)
    often = JPEG | {"reward_every": 1, "beta_cd": 0.0}
    fit(config(tiny, tmp_path, iterations=8, fake_updates=1, **often))
    said = capsys.readouterr().out
    assert said.count("over-optimised") == said.count("over-optimised at step 6") == 1 and "it was 1 at step 2" in said


def test_what_does_not_fit_is_refused(tiny, distilled, tmp_path):
    student = str(distilled / "student.safetensors")
    for changes, said in (
        ({"student": student, "steps": 2}, "--steps 4"),
        ({"student": student, "prediction": "velocity"}, "--prediction conjugate"),
        ({"student": f"{tiny}/teacher.safetensors"}, "is no student's file but a teacher's"),
    ):
        with pytest.raises(UserError, match=said):
            fit(config(tiny, tmp_path / "run", **changes))
    assert not Path(tmp_path / "run/student.safetensors").exists()


def test_a_fake_score_that_has_never_met_the_student_learns_first(tiny, distilled, tmp_path):
    flags = JPEG | {"iterations": 21, "beta_cd": 0.0, "fake_updates": 1, "reward_every": 0}
    *_, lines = fit(config(tiny, tmp_path, **flags, student=str(distilled / "student.safetensors")))
    assert ["vsd" in line for line in lines] == [False] * 20 + [True]
    assert all("fake" in line for line in lines)


# Parts


@pytest.fixture(scope="module")
def judged(tiny):
    return {"reward": "agreement", "reward_weights": f"{tiny}/judge.safetensors", "reward_samples": 4, "batch": 2}


def test_the_lrm_learns_a_judges_probabilities_and_the_number_is_computed(tiny, tmp_path, judged):
    cfg = config(tiny, tmp_path, **judged)
    made = nets.build(cfg, ALONE)
    latent, values = made.latent_reward, sum(len(values) for values in FACTORS.values())
    assert (
        latent.parts
        and made.lrm.config.outputs == values
        and made.lrm.config.apart == 5
        and made.lrm.cnn[0].stride == (1, 1)
    )
    prompts = ["a red star springs", "a small heart at sea", "a moon"]
    video = torch.rand(3, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = latent.labels(video, prompts)
    assert parts.shape == (3, values) and (parts >= 0).all()
    torch.testing.assert_close(latent.scores(parts, prompts), latent.reward(video, prompts))  # from its parts
    assert torch.equal(latent.target(parts), parts)
    # the gradient is that of the number: of the values that the prompt names, standardised, and of nothing else
    latent.moments = Moments(2.0, 0.25, 2 * 0.5**2)  # deviation 0.5
    made.lrm.forward = lambda x: x.flatten(1)[:, :values]
    x = torch.rand(1, 12, 5, 8, 8).requires_grad_()
    said = latent.estimate(x, None, ["a red star springs"])
    p = x.flatten(1)[0]
    first = {factor: sum(len(FACTORS[f]) for f in list(FACTORS)[: list(FACTORS).index(factor)]) for factor in FACTORS}
    named = {"object": "star", "colour": "red", "action": "springs"}
    places = [first[factor] + FACTORS[factor].index(value) for factor, value in named.items()]
    torch.testing.assert_close(said[0], (p[places].mean() - 0.25) / 0.5)
    said.sum().backward()
    want = torch.zeros_like(p)
    want[places] = 1 / (3 * 0.5)
    torch.testing.assert_close(x.grad.flatten(), want)


def test_parts_and_scalars_train_and_resume_to_the_bit(tiny, tmp_path, judged):
    for labels in ("parts", "scalar"):
        how = judged | {"lrm_labels": labels, "lrm_warmup": 1, "global_batch": 2, "reward_every": 1}
        straight, _, lines = fit(config(tiny, tmp_path / labels, **how))
        fit(config(tiny, tmp_path / "parts of it", **how | {"iterations": 2}))
        again, _, more = fit(config(tiny, tmp_path / "parts of it", **how | {"resume": True}))
        assert all(torch.equal(straight[name], again[name]) for name in straight)
        assert [line["lrm"] for line in lines] == [line["lrm"] for line in more]
        assert "ft" not in lines[0] and "ft" in lines[1] and "rank_correlation" in lines[1]
    with pytest.raises(UserError, match="is not made of parts"):
        fit(config(tiny, tmp_path / "x", **JPEG | {"lrm_labels": "parts"}))


def test_a_buffer_keeps_the_newest_and_gives_what_it_keeps():
    buffer = Buffer(4, (1, 1, 1, 1), 2, (1, 1))
    for i in range(3):
        x = torch.tensor([2.0 * i, 2.0 * i + 1])
        buffer.add(x.view(2, 1, 1, 1, 1), torch.stack([x, -x], 1), 10 * x.view(2, 1, 1))
    x, labels, text = buffer.sample(200, seed=0)
    assert set(x.flatten().tolist()) == {2, 3, 4, 5}
    assert torch.equal(labels, torch.stack([x.flatten(), -x.flatten()], 1)) and torch.equal(
        text.flatten(), 10 * x.flatten()
    )
    assert torch.equal(buffer.sample(9, seed=1)[0], buffer.sample(9, seed=1)[0])
    first = Buffer(4, (1, 1, 1, 1), 1)
    first.add(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1), torch.ones(1, 3, 3))
    assert (first.sample(50, seed=0)[0] == 1).all()  # never of a place that is still empty


def test_a_buffer_keeps_nothing_that_is_not_finite():
    x, labels = torch.tensor([1.0, math.inf, 3.0, 4.0]), torch.tensor([1.0, 2.0, math.nan, 4.0])
    buffer = Buffer(3, (1, 1, 1, 1), 1)
    buffer.add(x.view(4, 1, 1, 1, 1), labels.view(4, 1), torch.zeros(4, 1, 1))
    assert int(buffer.count) == 2 and buffer.x.flatten().tolist() == [1, 4, 0]


def test_one_clip_without_a_reward_costs_one_update_of_the_lrm(tiny, tmp_path, monkeypatch):
    calls, norms, descend = [], [], train.gradient_descent

    def light(video, prompts):
        calls.append(len(video))
        reward = video.mean((1, 2, 3, 4))
        return torch.cat([reward[:-1], reward[-1:] * math.nan]) if len(calls) == 1 else reward

    monkeypatch.setitem(rewards.REWARDS, "dynamic_degree", (light, True, False, True, ""))
    how = JPEG | {"reward": "dynamic_degree", "reward_every": 0, "lrm_updates": 3}

    def record(module, *rest):
        norm = descend(module, *rest)
        norms.extend([math.isfinite(norm)] if isinstance(module, VideoLRM) else [])
        return norm

    monkeypatch.setattr(train, "gradient_descent", record)
    *_, lines = fit(config(tiny, tmp_path, **how, iterations=3))
    assert norms == [False] + 8 * [True]
    assert lines[-1]["skipped"] == 1


def test_a_later_update_of_the_lrm_that_is_left_out_is_counted(tiny, tmp_path, monkeypatch):
    losses, really = [], train.lrm_loss

    def loss(*given):
        losses.append(really(*given))
        return losses[-1] * (math.nan if len(losses) == 3 else 1)

    monkeypatch.setattr(train, "lrm_loss", loss)
    *_, lines = fit(config(tiny, tmp_path, **JPEG | {"reward_every": 0, "lrm_updates": 3, "global_batch": 2}))
    assert len(losses) == 9 and [line["skipped"] for line in lines] == [1, 1, 1]


def test_moments_of_nothing_leave_a_score_as_it_is():
    assert rewards.Moments().standardise(torch.tensor(3.0)) == 3
