"""ddpo.py: its mathematics against closed forms in float64, the script with a tiny random student and VAE."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import adapters
import common
import ddpo
import rewards
from common import run
from ddpo import advantages, graded, log_probability, policy_loss, transition, walk
from distributed import Ranks
from dit import DiT, DiTConfig
from generate import Generator
from schedule import Schedule, few_step, timesteps
from vae3d import VAE3D, VAEConfig

STEPS = [999, 749, 499, 249]
KINDS = ("ddpm", "cogvideox", "flow")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# moves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["renoise", "posterior"])
def test_log_probability_is_that_of_the_normal_distribution(kind, how):
    schedule = Schedule(kind)
    x_t, x0, x_next = (normal(3, 2, 5, seed=s) for s in range(3))
    for t, t_next in ((999, 749), (749, 499), (499, 249)):
        (a_t, b_t), (a, b) = ((schedule.a[i], schedule.b[i]) for i in (t, t_next))
        if how == "renoise":
            mean, std = a * x0, b
        else:  # Bayes: N(x_next; a x_0, b^2) times N(x_t; r x_next, var), by adding precisions
            r, var = a_t / a, b_t**2 - (a_t / a * b) ** 2
            std = (1 / b**2 + r**2 / var) ** -0.5
            mean = std**2 * (a * x0 / b**2 + r * x_t / var)
        expected = torch.distributions.Normal(mean, std).log_prob(x_next)
        got = log_probability(schedule, x_t, x0, x_next, t, t_next, how)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected.mean((1, 2)))


def test_log_probability_sees_single_precision_inputs_in_double():
    x_t, x0, x_next = (normal(2, 4000, seed=s, dtype=torch.float32) for s in range(3))
    got = log_probability(Schedule(), x_t, x0, x_next, 749, 499, "renoise")
    b = Schedule().b[499]
    expected = torch.distributions.Normal(Schedule().a[499] * x0.double(), b).log_prob(x_next.double()).mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)  # float32 would be off by 1e-7


@pytest.mark.parametrize("how", ["renoise", "posterior"])
def test_moves_without_std_are_left_out(how):
    schedule = Schedule()
    assert graded(schedule, STEPS, how, 2) == [1, 2]  # 749 to 499 and 499 to 249, not 249 to x_0
    assert graded(schedule, STEPS, how, 9) == [0, 1, 2]
    assert graded(schedule, [999, 499], how, 2) == [0]
    assert graded(schedule, [999], how, 2) == []
    assert graded(schedule, STEPS, "ddim", 2) == []
    x = normal(1, 3)
    with pytest.raises(ValueError, match="no log-probability"):
        log_probability(schedule, x, x, x, 249, -1, how)
    with pytest.raises(ValueError, match="unknown transition"):
        transition(schedule, x, x, 249, -1, "jump")


def test_walk_samples_as_the_student_does():
    schedule, noise = Schedule(), lambda i: normal(2, 3, seed=10 + i, dtype=torch.float32)
    predict, x = lambda x, t: 0.5 * x + t / 999, normal(2, 3, dtype=torch.float32)
    steps_as_tensors = lambda x, t: predict(x, t[0].item())
    for how in ("renoise", "ddim"):
        path = walk(predict, schedule, x, STEPS, noise, how)
        assert len(path) == 4 and torch.equal(path[0][0], x)
        assert torch.equal(path[-1][1], few_step(steps_as_tensors, schedule, x, STEPS, noise, how))


def test_posterior_walk_keeps_the_marginals():
    schedule, x0 = Schedule(), 0.7
    noise = lambda i: normal(200_000, 1, seed=i)
    path = walk(lambda x, t: torch.full_like(x, x0), schedule, noise(9), STEPS, noise, "posterior")
    # from x_999 = a x_0 + b eps, all further x_t have mean a x_0 and std b; here a_999 is 0.006
    for (x_t, _), t in zip(path, STEPS):
        assert x_t.mean().item() == pytest.approx(schedule.a[t].item() * x0, abs=0.008)
        assert x_t.std().item() == pytest.approx(schedule.b[t].item(), rel=0.01)


class Scale(torch.nn.Module):
    """A student of one parameter: x_0 = theta x_t, or a policy that looks at nothing: x_0 = theta."""

    def __init__(self, theta, blind=False):
        super().__init__()
        self.theta, self.blind = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64)), blind

    def forward(self, x, t):
        return self.theta * (torch.ones_like(x) if self.blind else x)


def gauss(dimensions, n=8):
    """Nodes (N, dimensions) and weights (N,) that integrate polynomials against a standard normal exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    grid = np.stack(np.meshgrid(*[nodes] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    weight = np.stack(np.meshgrid(*[weights / weights.sum()] * dimensions, indexing="ij"), -1).prod(-1).reshape(-1)
    return torch.from_numpy(grid), torch.from_numpy(weight)


def policy_gradient(student, schedule, steps, how, n, reward, baseline=0.0):
    """-dL/dtheta by DDPO's own pieces, its expectation exact by quadrature."""
    nodes, weight = gauss(len(steps))
    path = walk(student, schedule, nodes[:, :1], steps, lambda i: nodes[:, i + 1 : i + 2], how)
    assert not any(x.requires_grad for pair in path for x in pair)
    value = (reward(path)[:, 0] - baseline) * weight * len(weight)  # policy_loss takes the mean over the batch
    for i in graded(schedule, steps, how, n):
        x_t, x_next = path[i][0], path[i + 1][0]
        log_p = log_probability(schedule, x_t, student(x_t, steps[i]), x_next, steps[i], steps[i + 1], how)
        policy_loss(log_p, value).backward()
    return -student.theta.grad.item()


@pytest.mark.parametrize("kind", KINDS)
def test_policy_gradient_of_a_gaussian_policy(kind):
    schedule, steps = Schedule(kind), [999, 499]
    a, b = schedule.a[499].item(), schedule.b[499].item()

    def of(theta, reward, baseline=0.0):
        student, of_move = Scale(theta, blind=True), lambda path: reward(path[1][0])
        return policy_gradient(student, schedule, steps, "renoise", 2, of_move, baseline)

    # x ~ N(a theta, b^2): d E[x] = a, d E[x^2] = 2 a^2 theta; a constant reward or baseline brings nothing
    for theta in (-0.3, 1.2):
        assert of(theta, lambda x: 3 * x) == pytest.approx(3 * a, rel=1e-9)
        assert of(theta, lambda x: x**2) == pytest.approx(2 * a**2 * theta, rel=1e-9)
        assert of(theta, lambda x: 3 * x, baseline=5.0) == pytest.approx(3 * a, rel=1e-9)
        assert of(theta, torch.ones_like) == pytest.approx(0.0, abs=1e-9 * a / b**2)


def test_policy_gradient_over_several_moves_and_truncated():
    schedule, steps, theta = Schedule(), [999, 666, 333], 0.8
    a1, a2 = (schedule.a[t].item() for t in steps[1:])
    # x_1 = a1 theta x_T + b1 e, x_2 = a2 theta x_1 + b2 e: E[x_T x_2] = a1 a2 theta^2
    reward = lambda path: path[0][0] * path[2][0]
    both = policy_gradient(Scale(theta), schedule, steps, "renoise", 2, reward)
    assert both == pytest.approx(2 * a1 * a2 * theta, rel=1e-9)
    last = policy_gradient(Scale(theta), schedule, steps, "renoise", 1, reward)  # theta of the last move alone
    assert last == pytest.approx(a1 * a2 * theta, rel=1e-9)


def test_policy_gradient_by_the_posterior():
    schedule, steps, theta = Schedule(), [999, 499], 0.8
    (a_t, b_t), (a, b) = ((schedule.a[t].item(), schedule.b[t].item()) for t in steps)
    slope = a * (1 - (a_t * b / (a * b_t)) ** 2)  # of the posterior's mean in x_0: 1 minus the share of x_t
    got = policy_gradient(Scale(theta, blind=True), schedule, steps, "posterior", 2, lambda path: path[1][0])
    assert got == pytest.approx(slope, rel=1e-9)


# advantages


def test_advantages_raw_and_of_the_batch():
    reward = torch.tensor([-2.0, -1.0, 0.0, 5.0], dtype=torch.float64)
    assert torch.equal(advantages("raw", reward), reward)
    got = advantages("batch", reward)
    torch.testing.assert_close(got, (reward - 0.5) / reward.std(correction=0))
    assert got.mean().abs() < 1e-12 and got.std(correction=0).item() == pytest.approx(1)
    assert torch.equal(advantages("batch", torch.full_like(reward, 2.0)), torch.zeros_like(reward))
    rare = torch.zeros(100, dtype=torch.float64).index_fill(0, torch.tensor([7]), 1.0)
    assert advantages("batch", rare).max() == 5.0  # it would be 9.9


# direct gradients


def test_direct_gradients_of_a_linear_student():
    schedule, theta = Schedule(), 0.8
    eps = lambda i: normal(4, 1, seed=20 + i)
    (a1, a2, a3), (b1, b2, b3) = schedule.a[STEPS[1:]], schedule.b[STEPS[1:]]
    x = normal(4, 1)
    x1 = a1 * theta * x + b1 * eps(0)
    x2 = a2 * theta * x1 + b2 * eps(1)
    x3 = a3 * theta * x2 + b3 * eps(2)
    expected = {
        (1, 1): x1,  # ReFL at the second step: x_0 = theta x_1
        (3, 3): x3,  # DRaFT-1
        (2, 3): x3 + theta * a3 * x2,  # DRaFT-2: theta (a3 theta x_2 + b3 e)
        (0, 3): x3 + theta * a3 * (x2 + theta * a2 * (x1 + theta * a1 * x)),
    }
    for (first, last), slope in expected.items():
        student = Scale(theta)
        path = walk(student, schedule, x, STEPS, eps, "renoise", first, last)
        assert len(path) == last + 1
        assert [x0.requires_grad for _, x0 in path] == [i >= first for i in range(last + 1)]
        (2 * path[-1][1]).sum().backward()  # the decoder and the reward: linear
        assert student.theta.grad.item() == pytest.approx(2 * slope.sum().item(), rel=1e-12)


# the script


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Flags that name a tiny student and VAE: 16 frames of 16x16 pixels."""
    folder = tmp_path_factory.mktemp("weights")
    config = DiTConfig(4, 32, 1, 2, text_dim=32, text_length=16, time_dim=16, latents=(5, 2, 2))
    model, noise = DiT(config), torch.Generator().manual_seed(1)
    with torch.no_grad():  # no layer may stay at zero, or neither words nor steps would change anything
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=noise)
    about = {"kind": "student", "timesteps": STEPS, "transition": "renoise", "settings": {"lr": 1}}
    common.save_model(folder / "student.safetensors", model, torch.float16, **about)
    common.save_model(folder / "ddim.safetensors", model, torch.float16, **about | {"transition": "ddim"})
    common.save_model(folder / "one.safetensors", model, kind="student", timesteps=[999])
    common.save_model(folder / "teacher.safetensors", model, kind="teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE3D(VAEConfig((8, 8, 8), 4, 1, 4, patch=4, chunking="independent", chunk_frames=16, scaling_factor=1.0))
        fat = VAE3D(VAEConfig((8, 8, 8), 6, 1, 4, patch=4, chunking="independent", chunk_frames=16, scaling_factor=1.0))
    common.save_model(folder / "vae.safetensors", vae)
    common.save_model(folder / "fat.safetensors", fat)
    return folder


# one update


def named(video, prompts):
    """A reward that reads its prompt: its length beside the mean of the pixels."""
    return video.mean((1, 2, 3, 4)) + torch.tensor([0.1 * len(prompt) for prompt in prompts])


@pytest.fixture
def update(weights, monkeypatch):
    """update(**flags) -> what one iteration was given and did; policy_loss answers with one bias of the student."""
    entry = (named, True, True, True, "")
    monkeypatch.setitem(rewards.REWARDS, "named", entry)

    def update(**changes):
        files = {"weights": f"{weights}/student.safetensors", "vae": f"{weights}/vae.safetensors", "reward": "named"}
        small = {"batch": 2, "global_batch": 4, "iterations": 8, "lr": 1e-3, "clip": 1e9, "device": "cpu"}
        cfg = ddpo.Config(**files | small | {"precision": "fp32", "beta_kl": 0.5} | changes)
        ranks = Ranks(0, 1, torch.device("cpu"))
        policy = ddpo.build(cfg, ranks)
        theta = lambda: policy.student.out.bias.view(-1)[0]
        seen = SimpleNamespace(policy=policy, clips=[], moves=[], losses=[], noise=[])
        seen.gradients, seen.theta = [], [theta().item()]
        before = {name: p.clone() for name, p in policy.frozen.named_parameters()}

        def sample(*args, **kwargs):
            seen.clips.append(sample_clips(*args, **kwargs))
            return seen.clips[-1]

        def probability(schedule, x_t, x0, *move):
            seen.moves.append((x_t, x0, *move))
            return log_probability(schedule, x_t, x0, *move)

        def loss(log_p, advantage):
            seen.losses.append((log_p, advantage))
            return theta() + 0 * log_p.sum()

        def descend(module, *rest):
            assert module is policy.student
            seen.gradients.append(theta_gradient())
            norm = gradient_descent(module, *rest)
            seen.theta.append(theta().item())
            return norm

        def draw(shape, key, numbers, device):
            seen.noise.append((*key, *numbers))
            return normal(shape, key, numbers, device)

        normal = ddpo.distributed.normal
        theta_gradient = lambda: policy.student.out.bias.grad.view(-1)[0].item()
        sample_clips, gradient_descent = ddpo.sample_clips, ddpo.distributed.gradient_descent
        with monkeypatch.context() as patch:
            patch.setattr(ddpo, "sample_clips", wraps(sample_clips)(sample))
            patch.setattr(ddpo, "log_probability", probability)
            patch.setattr(ddpo.distributed, "gradient_descent", descend)
            patch.setattr(ddpo.distributed, "normal", draw)
            patch.setattr(ddpo, "policy_loss", loss)
            adam = torch.optim.AdamW(policy.student.parameters(), cfg.lr)
            if cfg.method == "ddpo":
                seen.reward, seen.numbers, seen.made = ddpo.policy_step(policy, adam, 7, cfg.advantage)
            else:
                seen.reward, seen.numbers, seen.made = ddpo.direct_step(policy, adam, 7, cfg.method)
        assert all(torch.equal(before[name], p) for name, p in policy.frozen.named_parameters())
        return seen

    return update


def test_each_move_is_weighted_with_its_own_clips_reward(update):
    seen = update(advantage="raw")
    policy, order = seen.policy, [(clips, i) for clips in seen.clips for i in (1, 2)]  # 749 to 499 and 499 to 249
    assert policy.moves == [1, 2] and len(seen.losses) == 4 and len(seen.moves) == 4
    for (log_p, advantage), (clips, i), move in zip(seen.losses, order, seen.moves):
        (x_t, x0), (x_next, _) = clips.path[i], clips.path[i + 1]
        assert move[0] is x_t and move[2] is x_next and move[3:] == (STEPS[i], STEPS[i + 1], "renoise")
        assert not x0.requires_grad and move[1].requires_grad  # as sampled, and again with gradient
        torch.testing.assert_close(move[1], x0, rtol=1e-4, atol=1e-4)
        assert log_p.requires_grad
        torch.testing.assert_close(advantage, clips.reward.to(advantage))
    for clips in seen.clips:  # line 11: of the last step's x_0, with its own prompt
        video = policy.generator.vae.decode(clips.path[3][1]).clamp(-1, 1)
        torch.testing.assert_close(clips.reward, named(video, clips.captions), rtol=1e-4, atol=1e-5)
    assert [clips.numbers for clips in seen.clips] == [[0, 1], [2, 3]]
    assert len(set(seen.reward.tolist())) == 4  # or no order would be seen
    assert seen.reward.tolist() == [r for clips in seen.clips for r in clips.reward.tolist()]
    # noise of its own for each (seed, step, move) and clip
    assert seen.noise == [(0, 7, i, *part) for part in ([0, 1], [2, 3]) for i in ("start", 0, 1, 2)]
    # the mean over the parts of the sum over the moves; AdamW's first step is the learning rate, downhill
    assert seen.gradients == [pytest.approx(2.0, abs=1e-4)] and seen.made
    assert seen.theta[1] == pytest.approx(seen.theta[0] - 1e-3, abs=1e-5)
    assert seen.numbers["loss"] == pytest.approx(2 * seen.theta[0], abs=1e-5) and seen.numbers["kl"] < 1e-9


def test_clips_have_the_size_that_the_student_was_trained_at(update, weights, tmp_path):
    """Which need not be that of its teacher's config."""
    model, about = common.load_model(weights / "student.safetensors", DiT)
    of_cache = {key: about[key] for key in ("kind", "timesteps", "transition")} | {"latents": [5, 2, 4]}
    common.save_model(tmp_path / "wide.safetensors", model, **of_cache)
    seen = update(weights=str(tmp_path / "wide.safetensors"))
    assert all(x.shape == (2, 4, 5, 2, 4) for clips in seen.clips for x, _ in clips.path)


def test_clips_are_weighted_against_the_whole_iteration(update):
    seen = update(advantage="batch", truncate=1)
    assert seen.policy.moves == [2] and len(seen.losses) == 2
    weight = torch.cat([advantage for _, advantage in seen.losses])
    torch.testing.assert_close(weight, (seen.reward - seen.reward.mean()) / seen.reward.std(correction=0))


@pytest.mark.parametrize("method", ["refl", "draft"])
def test_direct_gradients_descend_minus_the_reward(update, method):
    seen = update(method=method)
    assert seen.policy.moves == [2, 3] and not seen.losses and seen.numbers["kl"] < 1e-9
    assert seen.numbers["loss"] == pytest.approx(-seen.reward.mean().item(), rel=1e-5)
    for clips in seen.clips:
        gradient = [x0.requires_grad for _, x0 in clips.path]
        # ReFL goes to one of the last two steps and no further, DRaFT through both
        assert gradient == [False, False, True, True] if method == "draft" else gradient[:2] == [False] * 2
        assert method == "draft" or gradient[2:] in ([True], [False, True])
    assert len({len(clips.path) for clips in seen.clips}) == 1  # the step is that of the update, not of a forward


@pytest.fixture
def call(weights, tmp_path, monkeypatch, capsys):
    """call(*flags) -> (exit code, stderr), in this process; a later --weights replaces the tiny student."""
    monkeypatch.chdir(tmp_path)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]

    def call(*flags):
        code = 0
        monkeypatch.setattr(sys, "argv", ["ddpo.py", *given(weights, *flags)])
        try:
            run(ddpo.main)
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    yield call
    for number, handler in handlers:
        signal.signal(number, handler)
    torch.set_flush_denormal(False)


def given(weights, *flags):
    files = ["--weights", weights / "student.safetensors", "--vae", weights / "vae.safetensors", "--device", "cpu"]
    return [str(f) for f in [*files, "--batch", 2, "--global-batch", 2, "--iterations", 1,
                               "--reward-samples", 3, *flags]]  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(a, b):
    a, b = (common.load_tensors(Path(folder) / "student.safetensors")[0] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def processes(weights, folder, *flags, ranks=1):
    """The script as so many processes, as torchrun would start them; what the first says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    how = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, ddpo.__file__, *given(weights, *flags)]
    place = lambda rank: env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    running = [subprocess.Popen(command, env=place(rank), **how) for rank in range(ranks)]
    said = [p.communicate() for p in running]
    assert [p.returncode for p in running] == [0] * ranks, said
    return said[0][0]


def test_a_student_of_ddim_moves_by_the_posterior(weights):
    """Its own moves have no density; the direct gradients need none."""
    for method, how in (("ddpo", "posterior"), ("draft", "ddim")):
        files = {"weights": f"{weights}/ddim.safetensors", "vae": f"{weights}/vae.safetensors"}
        cfg = ddpo.Config(**files, method=method, reward="dynamic_degree", device="cpu")
        policy = ddpo.build(cfg, Ranks(0, 1, torch.device("cpu")))
        assert policy.transition == how and policy.generator.about["transition"] == "ddim"


def test_refl_as_a_process(weights, tmp_path):
    said = processes(weights, tmp_path, "--method", "refl", "--reward", "dynamic_degree", "--beta-kl", 1)
    assert "runs/ddpo/student.safetensors" in said
    (line,) = lines(tmp_path / "runs/ddpo")
    assert line["loss"] == pytest.approx(-line["reward_mean"], rel=1e-5)  # kl is 0: nothing has changed yet
    assert line["kl"] == 0 and line["grad_norm"] > 0 and line["reward_evaluations"] == 2
    assert not same(weights, tmp_path / "runs/ddpo")


def test_adapters_learn_beside_the_student_they_hold_on_to(weights, tmp_path, call):
    flags = ["--rank", 4, "--beta-kl", 1, "--reward", "dynamic_degree", "--save-every", 1, "--lr", 1e-3]
    assert call(*flags, "--iterations", 2, "--out", "straight")[0] == 0
    assert call(*flags, "--out", "parts")[0] == 0
    assert call(*flags, "--iterations", 2, "--out", "parts", "--resume")[0] == 0
    assert same(tmp_path / "straight", tmp_path / "parts")
    first, second = lines(tmp_path / "straight")
    assert first["kl"] == 0 < second["kl"]
    before, after = (common.load_tensors(Path(f) / "student.safetensors")[0] for f in (weights, tmp_path / "straight"))
    moved = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(adapters.MAPS)


def test_ddpo_on_two_ranks_is_ddpo_on_one(weights, tmp_path, call):
    # a smooth reward: the size of a JPEG jumps by a byte where one pixel is rounded
    flags = ["--reward", "dynamic_degree", "--precision", "fp32", "--advantage", "batch", "--global-batch", 4]
    processes(weights, tmp_path, *flags, "--out", "two", ranks=2)
    assert call(*flags, "--batch", 4, "--out", "one")[0] == 0
    (two,), (one,) = lines("two"), lines("one")
    for key in ("reward_mean", "reward_std", "reward_evaluations", "grad_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert one["reward_evaluations"] == 4 and one["reward_std"] > 0 and one["grad_norm"] > 0


def test_resume_goes_on_to_the_bit(weights, call, monkeypatch):
    flags = ["--reward", "jpeg_compressibility", "--beta-kl", 1, "--lr", 1e-3, "--global-batch", 4]
    flags += ["--reward-every", 1, "--transition", "posterior"]
    assert call(*flags, "--iterations", 5, "--out", "whole")[0] == 0
    assert call(*flags, "--iterations", 3, "--out", "parts")[0] == 0
    assert not same("whole", "parts")
    told = []
    monkeypatch.setattr(ddpo, "say_resumed", lambda _, *settings: told.append([s["iterations"] for s in settings]))
    assert call(*flags, "--iterations", 5, "--out", "parts", "--resume")[0] == 0
    assert same("whole", "parts") and told == [[3, 5]]
    a, b = ([line | {"trained_s": 0} for line in lines(folder)] for folder in ("whole", "parts"))
    assert a == b and [line["reward_evaluations"] for line in a] == [4, 8, 12, 16, 20]
    assert all(math.isfinite(value) for line in a for value in line.values())
    assert a[0]["kl"] == 0 < a[1]["kl"]
    assert {"step000000.png", "step000005.png"} <= {file.name for file in Path("whole").iterdir()}
    assert call(*flags, "--iterations", 1, "--out", "parts")[0] == 0  # begun anew: the old checkpoints are set aside
    newest = [max(p.name for p in Path("parts", name).glob("step_*")) for name in ("checkpoints", "checkpoints.1")]
    assert newest == ["step_00000001", "step_00000005"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started it again: it goes on
    assert call(*flags, "--iterations", 2, "--out", "parts")[0] == 0
    assert not Path("parts/checkpoints.2").exists() and len(lines("parts")) == 2
    said = max(Path("parts/checkpoints").glob("step_*")) / "extra.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"config": {"beta_cd": 0.5}}))
    assert "is not of ddpo.py" in call(*flags, "--iterations", 3, "--out", "parts", "--resume")[1]
    # what sample.py takes
    student = Generator.load("whole/student.safetensors", weights / "vae.safetensors")
    assert student.student and student.steps(4) == STEPS and student.about["settings"] == {"lr": 1}
    (tuned,) = student.about["tuned"]
    assert tuned["reward_evaluations"] == 20 and tuned["settings"]["reward"] == "jpeg_compressibility"


def brightness(*_, name="bright"):
    """A reward that is linear in the pixels."""
    return rewards.Reward(name, lambda video, _: video.mean((1, 2, 3, 4)), True, False, None, "cpu")


@pytest.mark.parametrize("method", ["ddpo", "draft"])
def test_the_reward_rises(call, monkeypatch, method):
    monkeypatch.setattr(rewards, "make", brightness)
    flags = ["--reward", "bright", "--method", method, "--iterations", 6, "--advantage", "batch", "--precision", "fp32"]
    assert call(*flags, "--batch", 32, "--global-batch", 32, "--lr", 1e-2)[0] == 0
    reward = [line["reward_mean"] for line in lines("runs/ddpo")]
    assert reward[-1] > reward[0] + 0.02, reward


@pytest.mark.parametrize("method", ["ddpo", "refl"])
def test_beta_kl_holds_on_to_the_student(call, monkeypatch, method):
    monkeypatch.setattr(rewards, "make", brightness)
    flags = ["--reward", "bright", "--method", method, "--iterations", 3, "--truncate", 1, "--lr", 1e-2]
    for beta in (1e-9, 1e3):
        assert call(*flags, "--precision", "fp32", "--beta-kl", beta, "--out", str(beta))[0] == 0
    free, held = ([line["kl"] for line in lines(str(beta))] for beta in (1e-9, 1e3))
    assert free[0] == held[0] == 0 and held[-1] < 0.5 * free[-1], (free, held)


def test_a_reward_that_is_not_finite_touches_nothing(weights, call, monkeypatch):
    monkeypatch.setattr(ddpo, "PATIENCE", 2)
    nan = lambda video, _: video.mean((1, 2, 3, 4)) * torch.tensor([1, math.nan])
    monkeypatch.setattr(rewards, "make", lambda *_: rewards.Reward("nan", nan, True, False, None, "cpu"))
    for method in ("ddpo", "refl"):
        code, err = call("--reward", "bright", "--method", method, "--iterations", 9, "--out", method)
        assert code == 2 and "2 iterations in a row were not finite" in err
        assert [line["skipped"] for line in lines(method)] == [1, 2]
        monkeypatch.setattr(rewards, "make", brightness)
        assert call("--reward", "bright", "--method", method, "--iterations", 2, "--resume", "--out", method)[0] == 0
        assert same(weights, method)
        monkeypatch.setattr(rewards, "make", lambda *_: rewards.Reward("nan", nan, True, False, None, "cpu"))


def test_wrong_input_is_one_clear_line(weights, call, tmp_path):
    jpeg = ["--reward", "jpeg_compressibility"]
    (tmp_path / "odd.txt").write_text("a red star\na red hippopotamus\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "file").write_text("")
    for flags, what in (
        ([], "--reward is needed"),
        (["--reward", "beauty"], "unknown reward 'beauty'"),
        ([*jpeg, "--method", "refl"], "jpeg_compressibility has no gradient"),
        ([*jpeg, "--method", "draft"], "has no gradient, which --method draft needs"),
        ([*jpeg, "--weights", weights / "teacher.safetensors"], "is no few-step student"),
        ([*jpeg, "--weights", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        ([*jpeg, "--weights", weights / "one.safetensors"], "needs two steps"),
        ([*jpeg, "--transition", "ddim"], "by ddim has a density"),
        ([*jpeg, "--vae", weights / "fat.safetensors"], "has 6 latent channels"),
        ([*jpeg, "--advantage", "batch", "--batch", 1, "--global-batch", 1], "2 or more"),
        ([*jpeg, "--global-batch", 3], "no multiple of 2"),
        ([*jpeg, "--truncate", 0], "at least 1"),
        ([*jpeg, "--batch", 0], "at least 1"),
        ([*jpeg, "--prompts", "missing.txt"], "cannot read missing.txt"),
        ([*jpeg, "--prompts", "empty.txt"], "is empty"),
        ([*jpeg, "--prompts", "odd.txt"], "hippopotamus"),
        ([*jpeg, "--resume"], "holds no checkpoint"),
        ([*jpeg, "--out", "file/here"], "cannot write"),
        ([*jpeg, "--method", "ppo"], "invalid choice"),
        ([*jpeg, "--weights", "in/student.safetensors", "--out", "in"], "written over by the result"),
    ):
        code, err = call(*flags)
        assert code == 2 and what in err and err.count("\n") == 1, (flags, code, err)
    assert timesteps(4) == STEPS
