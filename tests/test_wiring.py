"""What is wired to what in one update of Algorithm 1, read off by spies in the losses' places.

The losses have tests of their own (test_losses.py). Here each is replaced by one that writes down what it was given and
answers with a multiple of a single parameter, so that the gradient says which losses were summed with which weights.
"""

from copy import deepcopy
from functools import wraps
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from conftest import config, fit

import nets
import rewards
import train
from distributed import Ranks
from losses import GRID
from lrm import LatentReward
from schedule import denoise, guide, timesteps

ALONE = Ranks(0, 1, torch.device("cpu"))
CHANGES = {"batch": 2, "global_batch": 4, "iterations": 8, "fake_updates": 3, "m": 2, "w_vsd": 2.0, "w_cd": 5.0}
CHANGES |= {"beta_vsd": 0.5, "beta_cd": 0.25, "beta_ft": 2.0, "ema": 0.9}
CHANGES |= {
    "ft_share": 0.0,
    "fake_warmup": 0,
    "lrm_warmup": 0,
    "lrm_updates": 1,
    "lr": 1e-3,
    "fake_lr": 2e-3,
}
KEYS = ((0, 1), (1, 0))  # another step, another seed
SLOPES = {"vsd": 1.0, "cd": 16.0, "ft": 256.0, "fake": 1.0, "lrm": 1.0}  # of the losses, in a parameter of a network


def light(video, prompts):
    """A reward that reads its prompt: the length of the text beside the mean of the pixels."""
    return video.mean((1, 2, 3, 4)) + torch.tensor([0.1 * len(prompt) for prompt in prompts])


@pytest.fixture
def record(tiny, tmp_path, monkeypatch):
    """record(**changes) -> what one update was given and did."""
    entry = (light, True, True, True, "")
    monkeypatch.setitem(rewards.REWARDS, "light", entry)

    def record(known=False, **changes):
        cfg = config(tiny, tmp_path / "run", **CHANGES | {"reward": "light"} | changes)
        made = nets.build(cfg, ALONE)
        seen = SimpleNamespace(cfg=cfg, nets=made, calls=[], batches=[], samples=[], integers={}, gradients={})
        decode, generator = made.vae.decode, torch.Generator().manual_seed(5)
        made.vae.decode = lambda z: 4 * decode(z)  # pixels beyond -1..1
        for network in (made.student, made.fake, made.ema):  # no two alike
            for p in network.parameters():
                p.data += 0.05 * torch.randn(p.shape, generator=generator)
        seen.before = {name: deepcopy(network) for name, network in (made.modules | {"teacher": made.teacher}).items()}
        parameter = {name: next(made.modules[name].parameters()).view(-1) for name in ("student", "fake", "lrm")}
        seen.parameter = lambda name: next(made.modules[name].parameters()).detach().view(-1)[0].item()
        seen.start = {name: seen.parameter(name) for name in parameter}

        def spy(name, network, keep, answer=lambda loss: loss):
            def loss(*args, **kwargs):
                seen.calls.append((name, keep(*args, **kwargs)))
                of_x = 0 * seen.calls[-1][1]["x"].sum()  # a gradient there, which the reward's share asks for
                return answer(SLOPES[name] * next(made.modules[network].parameters()).view(-1)[0] + of_x)

            return loss

        def vsd(x, real, fake, schedule, t, eps, weight):
            return {"x": x, "real": seen.read(real), "fake": seen.read(fake), "t": t, "eps": eps, "weight": weight}

        def cd(student, target, teacher, schedule, x0, n, eps, m, loss):
            read = {"student": seen.read(student), "target": seen.read(target), "teacher": seen.read(teacher)}
            return read | {"x": x0, "n": n, "eps": eps, "m": m, "loss": loss}

        def diffusion(model, schedule, x0, t, eps, prediction):
            return {"out": seen.read(model), "x": x0, "t": t, "eps": eps, "prediction": prediction}

        info = {"score_gap": torch.tensor(0.0), "dropped": torch.tensor(0)}
        spies = {
            "vsd_loss": spy("vsd", "student", vsd, lambda loss: (loss, info)),
            "consistency_loss": spy("cd", "student", cd),
            "reward_loss": spy("ft", "student", lambda estimate, x, pull: {"estimate": estimate, "x": x, "pull": pull}),
            "conjugate_velocity_loss": spy("fake", "fake", diffusion),
            "lrm_loss": spy("lrm", "lrm", lambda *given: dict(zip(("lrm", "x", "reward", "text"), given))),
        }
        # the probe: where every network is asked what it says
        seen.x, seen.t = torch.randn(2, 12, 5, 8, 8, generator=generator), torch.tensor([300, 900])
        seen.read = lambda network: network(seen.x, seen.t).detach()

        sample_batch, generate, descend = train.sample_batch, train.generate, train.gradient_descent

        @wraps(sample_batch)  # its signature says which flags it takes
        def batch(*args, **kwargs):
            seen.calls.append(("batch", None))
            seen.batches.append(sample_batch(*args, **kwargs))
            if known:
                seen.batches[-1].reward = torch.tensor([3.0, -4.0]) * len(seen.batches)
            return seen.batches[-1]

        def sample(nets, batch, j, *how):
            seen.samples.append((batch, j, how, generate(nets, batch, j, *how)))
            return seen.samples[-1][-1]

        def step(module, optimizer, *rest):
            (name,) = (name for name, network in made.modules.items() if network is module)
            assert [p for group in optimizer.param_groups for p in group["params"]] == list(module.parameters())
            seen.calls.append(("step", name))
            seen.gradients.setdefault(name, []).append(next(module.parameters()).grad.view(-1)[0].item())
            return descend(module, optimizer, *rest)

        integers = train.Batch.integers

        def draw(batch, low, high, *name):
            seen.integers[name] = low, high, integers(batch, low, high, *name)
            return seen.integers[name][-1]

        places = spies | {"sample_batch": batch, "generate": sample, "gradient_descent": step}
        places |= {"CLIP": 1e9, "T_RANGE": (30, 700), "LRM_LR": 4e-3}
        for name, value in places.items():
            monkeypatch.setattr(train, name, value)
        monkeypatch.setattr(train.Batch, "integers", draw)
        optimizers = train.adam(made, cfg.lr, cfg.fake_lr, (0.9, 0.999))
        seen.step, seen.numbers, seen.made, seen.scored = next(train.algorithm_1(cfg, ALONE, made, optimizers, 2, 7))
        seen.of = lambda name: [given for call, given in seen.calls if call == name]
        return seen

    return record


def raw(seen, network, text, w=None):
    """What a network as it was before the update puts out at the probe, guided with w (Eq. 9)."""
    with torch.no_grad():
        out = network(seen.x, seen.t, text)
        return out if w is None else guide(out, network(seen.x, seen.t, seen.nets.null.expand_as(text)), w)


def x0(seen, name, text, w=None):
    network = seen.before[name]
    return seen.nets.schedule.to_x0(raw(seen, network, text, w), seen.x, seen.t, network.config.prediction)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return True


def test_the_order_is_that_of_the_listing(record):
    seen = record()
    order = [(name, given if name == "step" else None) for name, given in seen.calls]
    losses = [(name, None) for name in ("vsd", "cd", "ft")]
    assert order[:2] == [("batch", None)] * 2  # line 6
    assert order[2:9] == [*losses * 2, ("step", "student")]  # 7-11 and 18-19
    assert order[9:18] == [("fake", None), ("fake", None), ("step", "fake")] * 3  # 12-14
    assert order[18:] == [("lrm", None), ("lrm", None), ("step", "lrm")]  # 15-17
    assert seen.made and seen.step == 7 and seen.scored == 8
    assert [(batch.key, batch.numbers) for batch in seen.batches] == [((0, 7), [0, 1]), ((0, 7), [2, 3])]
    clips = torch.cat([batch.x for batch in seen.batches])
    assert not any(torch.equal(a, b) for a, b in combinations(clips, 2))


def test_vsd_compares_the_guided_teacher_with_the_fake_score_on_the_students_samples(record):
    seen = record()
    for given, batch in zip(seen.of("vsd"), seen.batches):
        assert same(given["real"], x0(seen, "teacher", batch.text, 2.0))  # guided with w_vsd
        assert same(given["fake"], x0(seen, "fake", batch.text))  # not guided
        (x_hat, _, _) = next(out for of, j, _, out in seen.samples if of is batch and j == 0)
        assert given["x"] is x_hat and x_hat.requires_grad
        assert given["weight"] == "dmd"
    low, high, _ = seen.integers[("t",)]
    assert (low, high) == (30, 700) and torch.equal(seen.of("vsd")[-1]["t"], seen.integers[("t",)][2])


@pytest.mark.parametrize("target", ["ema", "student", "teacher"])
def test_cd_asks_the_guided_teacher_and_its_target_on_data(record, target):
    seen = record(cd_target=target, cd_loss="mse")
    for given, batch in zip(seen.of("cd"), seen.batches):
        assert same(given["student"], x0(seen, "student", batch.text))
        assert same(given["teacher"], x0(seen, "teacher", batch.text, 5.0))  # guided with w_cd
        assert same(given["target"], x0(seen, target, batch.text, 5.0 if target == "teacher" else None))
        assert given["x"] is batch.x and given["m"] == 2 and given["loss"] == "mse"
    low, high, n = seen.integers[("n",)]
    assert (low, high) == (0, len(GRID) - 1 - 2) == (0, 48) and torch.equal(seen.of("cd")[-1]["n"], n)


def test_the_student_descends_the_weighted_sum_and_its_average_follows(record):
    seen = record()
    assert seen.gradients["student"] == [0.5 * 1 + 0.25 * 16 + 2.0 * 256]  # beta_vsd, beta_cd, beta_ft (Eq. 16)
    for name, beta in (("vsd", 0.5), ("cd", 0.25), ("ft", 2.0)):
        assert seen.numbers[name] == pytest.approx(beta * SLOPES[name] * seen.start["student"])
    assert seen.parameter("student") == pytest.approx(seen.start["student"] - 1e-3, abs=1e-5)  # AdamW's first step
    for old, new, ema in zip(*(m.parameters() for m in (seen.before["ema"], seen.nets.student, seen.nets.ema))):
        torch.testing.assert_close(ema.double(), 0.9 * old.double() + 0.1 * new.double(), rtol=0, atol=1e-7)
    for old, new in zip(seen.before["teacher"].parameters(), seen.nets.teacher.parameters()):
        assert torch.equal(old, new)


def test_the_kl_is_the_mean_square_between_both_x0(record):
    seen = record(beta_kl=3.0)
    begun = [(batch, of_student) for batch, j, _, of_student in seen.samples if j == 0]  # one for each part of a batch
    distances = []
    for batch, (x_hat, x_t, t) in begun:
        with torch.no_grad():
            before = denoise(seen.before["teacher"], seen.nets.schedule, x_t, t, batch.text, "conjugate")
        distances.append((x_hat - before).square().mean().item())
    assert len(distances) == 2 and seen.numbers["kl"] == pytest.approx(3.0 * sum(distances) / 2, rel=1e-4)


def test_the_fake_score_learns_from_the_students_samples_at_all_steps(record):
    seen = record()
    given, batches = seen.of("fake"), seen.batches
    assert len(given) == 3 * 2
    for i, call in enumerate(given):
        j, batch = i // 2, batches[i % 2]
        (x_hat,) = [out[0] for of, at, _, out in seen.samples if of is batch and at == j]
        assert torch.equal(call["x"], x_hat) and not call["x"].requires_grad and call["x"].shape == batch.x.shape
        assert (call["x"] - batch.x).abs().mean() > 0.1  # no real data
        assert call["prediction"] == "conjugate"
    for call, batch in zip(given[:2], batches):  # before it has moved: not guided
        assert same(call["out"], raw(seen, seen.before["fake"], batch.text))
    for j in range(3):
        low, high, t = seen.integers[("fake t", j)]
        assert (low, high) == (0, 999) and torch.equal(given[2 * j + 1]["t"], t)
    assert seen.gradients["fake"] == [1.0] * 3
    assert seen.parameter("fake") == pytest.approx(seen.start["fake"] - 3 * 2e-3, abs=1e-4)


def test_the_fake_score_is_pulled_towards_the_student(record):
    seen = record(fake_pull=0.25)
    moved = seen.start["fake"] - 3 * 2e-3  # by its updates
    assert seen.parameter("fake") == pytest.approx(0.75 * moved + 0.25 * seen.parameter("student"), abs=1e-4)
    before, fake, student = (list(m.parameters())[-1] for m in (seen.before["fake"], seen.nets.fake, seen.nets.student))
    torch.testing.assert_close(fake, 0.75 * before + 0.25 * student, rtol=1e-3, atol=1e-5)  # no gradient there
    assert not torch.allclose(before, student, atol=1e-2)


@pytest.mark.parametrize("known", [False, True])
def test_the_lrm_learns_each_clips_own_reward(record, known):
    """In the order of the latents: real, then generated; of a cache that knows the real ones' rewards, these."""
    seen, scores = record(known=known), []
    for call, batch in zip(seen.of("lrm"), seen.batches):
        (x_hat,) = [out[0].detach() for of, j, _, out in seen.samples if of is batch and j == 0]
        x = torch.cat([batch.x, x_hat])
        assert call["lrm"] is seen.nets.lrm and torch.equal(call["x"], x)
        assert torch.equal(call["text"], torch.cat([batch.text, batch.text]))
        video = seen.nets.vae.decode(x).clamp(-1, 1)
        mine = light(video, [*batch.captions, *batch.captions])
        mine = torch.cat([batch.reward, mine[2:]]) if known else mine
        scores.append(mine)
        assert len(set(call["reward"].tolist())) == 4  # or no order would be seen
    scores = torch.cat(scores)
    standardised = (scores - scores.mean()) / scores.std(correction=0)  # by all that has been seen
    given = torch.cat([call["reward"] for call in seen.of("lrm")])
    torch.testing.assert_close(given, standardised, rtol=1e-4, atol=1e-4)
    assert seen.scored == (4 if known else 8)
    assert seen.numbers["reward"] == pytest.approx(torch.cat([scores[2:4], scores[6:]]).mean().item(), abs=1e-3)
    assert seen.numbers["reward_real"] == pytest.approx(torch.cat([scores[:2], scores[4:6]]).mean().item(), abs=1e-3)
    assert seen.gradients["lrm"] == [1.0]
    assert seen.parameter("lrm") == pytest.approx(seen.start["lrm"] - 4e-3, abs=1e-4)


def test_the_reward_is_asked_of_the_students_samples(record, monkeypatch):
    asked, really = [], LatentReward.estimate

    def estimate(self, x, text, captions):
        asked.append(captions)
        return really(self, x, text, captions)

    monkeypatch.setattr(LatentReward, "estimate", estimate)
    seen = record()
    for call, batch in zip(seen.of("ft"), seen.batches):
        (x_hat,) = [out[0] for of, j, _, out in seen.samples if of is batch and j == 0]
        assert call["x"] is x_hat and call["pull"] is None
        x = x_hat.detach()
        assert torch.equal(call["estimate"](x), seen.nets.lrm(x, batch.text)) and asked[-1] == batch.captions


def test_the_rewards_pull_is_a_share_of_vsds(tiny, tmp_path, monkeypatch):
    """On each sample by itself, so that it does not depend on who else is in the batch."""
    entry = (light, True, True, True, "")
    monkeypatch.setitem(rewards.REWARDS, "light", entry)
    cfg = config(
        tiny, tmp_path / "run", reward="light", fake_warmup=0, lrm_warmup=0, ft_share=0.25, beta_vsd=0.5, iterations=1
    )
    made, seen, grad = nets.build(cfg, ALONE), {}, torch.autograd.grad

    def sample(*given):
        seen["x"], *rest = generate(*given)
        return seen["x"], *rest

    def spy(name):
        loss = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *a, **k: seen.setdefault(name, loss(*a, **k)))

    generate = train.generate
    monkeypatch.setattr(train, "generate", sample)
    spy("vsd_loss"), spy("reward_loss")
    monkeypatch.setattr(train, "fake_score_step", lambda *_, **__: {"fake_norm": 0.0})
    optimizers = train.adam(made, 1e-4, 1e-4, (0.0, 0.99))
    kept = lambda *args, **more: grad(*args, **more | {"retain_graph": True})
    monkeypatch.setattr(torch.autograd, "grad", kept)
    backward = torch.Tensor.backward

    def before_the_graph_is_freed(loss, *args, **kwargs):
        if "norms" not in seen:
            seen["norms"] = [
                grad(part, seen["x"], retain_graph=True)[0].flatten(1).norm(dim=1)
                for part in (seen["vsd_loss"][0], seen["reward_loss"])
            ]
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", before_the_graph_is_freed)
    _, numbers, _, _ = next(train.algorithm_1(cfg, ALONE, made, optimizers))
    vsd, ft = seen["norms"]
    torch.testing.assert_close(ft, 0.25 * 0.5 * vsd, rtol=1e-4, atol=0)
    assert numbers["vsd_pull"] == pytest.approx(0.5 * vsd.mean().item(), rel=1e-4)
    assert numbers["ft_pull"] == pytest.approx(ft.mean().item(), rel=1e-4)


def test_further_lrm_updates_take_what_was_kept(record):
    seen = record(lrm_updates=3)
    calls, fresh = seen.of("lrm"), torch.cat([call["x"] for call in seen.of("lrm")[:2]])
    labels = torch.cat([call["reward"] for call in calls[:2]])
    assert len(calls) == 6 and seen.gradients["lrm"] == [1.0] * 3 and seen.scored == 8
    for call in calls[2:]:
        assert call["x"].shape == (4, 12, 5, 8, 8)
        for x in call["x"]:
            assert (fresh.bfloat16() == x).flatten(1).all(1).any()
    assert len({tuple(call["x"].flatten().tolist()) for call in calls}) == 6 and len(labels) == 8


def test_the_buffer_counts_the_text_it_keeps(record, monkeypatch):
    a_sample = 2 * (12 * 5 * 8 * 8 + 32 * 128)  # bytes
    monkeypatch.setattr(nets, "BUFFER_BYTES", 3 * a_sample)
    assert len(record().nets.buffer.x) == 3


def test_warmups_hold_the_student_back(record):
    seen = record(fake_warmup=8, lrm_warmup=8)
    assert not seen.of("vsd") and not seen.of("ft") and seen.of("fake") and seen.of("lrm")
    assert seen.gradients["student"] == [0.25 * 16]


def test_the_reward_waits_for_vsd(record):
    seen = record(fake_warmup=8)
    assert not seen.of("vsd") and not seen.of("ft")


def test_no_noise_serves_twice(record):
    seen = record()
    noises = [given["eps"] for name in ("vsd", "cd", "fake") for given in seen.of(name)]
    assert len(noises) == 2 + 2 + 6
    assert not any(torch.equal(a, b) for a, b in combinations(noises, 2))
    assert all(abs(noise.std().item() - 1) < 0.1 for noise in noises)


@pytest.mark.parametrize("source", ["simulate", "data"])
def test_the_student_samples_at_one_of_its_steps(record, source):
    seen = record(generator_input=source, transition="ddim")
    assert len({j for _, j, _, _ in seen.samples}) == 3
    for batch, j, how, (x_hat, x_t, t) in seen.samples[:2]:
        assert t in timesteps(4) and how == (4, source, "ddim") and j == 0
        expected = lambda x, t, text=batch.text: seen.nets.schedule.to_x0(
            seen.before["student"](x, torch.full((2,), t), text), x, t, "conjugate"
        )
        with torch.no_grad():
            assert same(x_hat, expected(x_t, t))
            x = batch.noise("start", 0)
            for s, s_next in zip(timesteps(4), timesteps(4)[1:]):
                x = seen.nets.schedule.ddim_step(x, expected(x, s), s, s_next) if s > t else x
            noised = seen.nets.schedule.add_noise(batch.x, batch.noise("data", 0), t)
            assert same(x_t, x if source == "simulate" else noised)


def test_random_numbers_follow_from_seed_step_name_and_sample():
    make = lambda *key: train.Batch(torch.zeros(400, 1), None, [], None, key, list(range(400)))
    batch = make(0, 0)
    assert set(batch.integers(3, 7, "a").tolist()) == {3, 4, 5, 6, 7}  # both ends
    for ask in (lambda batch, name: batch.integers(0, 999, name), lambda batch, name: batch.noise(name)):
        assert torch.equal(ask(batch, "a"), ask(make(0, 0), "a"))
        assert not any(torch.equal(ask(batch, "a"), x) for x in (ask(batch, "b"), *(ask(make(*k), "a") for k in KEYS)))
        assert ask(batch, "a").unique().numel() > 200


def test_a_step_along_the_reward_raises_what_the_lrm_says(tiny, tmp_path, monkeypatch):
    """With the true losses: of the very samples it was taken on, and the average goes where the student goes."""
    alone = {"beta_vsd": 0.0, "beta_cd": 0.0, "reward": "jpeg_compressibility", "batch": 4, "iterations": 1}
    cfg = config(tiny, tmp_path, **alone, lrm_warmup=0, fake_warmup=0, lr=1e-3)
    monkeypatch.setattr(train, "CLIP", 1e9)
    made = nets.build(cfg, ALONE)
    optimizers = train.adam(made, cfg.lr, cfg.fake_lr, (0.9, 0.999))
    made.clips = train.read_ahead(made, ALONE, 1, seed=cfg.seed, batch=4, data="shapes", iterations=1)
    (batch,) = [train.sample_batch(made, ALONE, 0, 0, 1, seed=cfg.seed, batch=4)]
    says = lambda: made.lrm(train.generate(made, batch, 0, 4, "simulate", "renoise")[0]).mean().item()
    lrm, before = deepcopy(made.lrm), says()
    next(train.algorithm_1(cfg, ALONE, made, optimizers))
    made.lrm = lrm  # as it was
    assert says() > before + 1e-4


def test_the_log_has_the_means_and_the_counts(tiny, tmp_path):
    *_, lines = fit(config(tiny, tmp_path, iterations=1, reward="jpeg_compressibility", batch=1, global_batch=2))
    assert lines[0]["reward_evaluations"] == 4 and lines[0]["dropped"] == 0
