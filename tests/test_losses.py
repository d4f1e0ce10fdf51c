"""The losses against closed forms, in float64: Gaussians, where scores, KL and consistency functions are known."""

import pytest
import torch

from losses import HUBER_C, conjugate_velocity_loss, consistency_loss, lrm_loss, reward_loss, vsd_loss
from lrm import ImageLRM, TextImageLRM
from schedule import Schedule

KINDS = ("ddpm", "cogvideox", "flow")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Scale(torch.nn.Module):
    """A one-parameter denoiser."""

    def __init__(self, k):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x_t, t):
        return self.k * x_t


# Eq. 4


@pytest.mark.parametrize("prediction", ["conjugate", "velocity", "epsilon", "sample"])
def test_diffusion_loss_is_the_mean_squared_error_of_the_target(prediction):
    schedule, t = Schedule(), torch.tensor([0, 500, 999])
    x0, eps, out = (normal(3, 2, 4, seed=s) for s in range(3))
    a, b = schedule.a[t][:, None, None], schedule.b[t][:, None, None]
    target = {"conjugate": x0 - eps, "velocity": a * eps - b * x0, "epsilon": eps, "sample": x0}[prediction]

    def model(x_t, step):
        assert torch.equal(step, t)
        torch.testing.assert_close(x_t, a * x0 + b * eps)
        return out

    loss = conjugate_velocity_loss(model, schedule, x0, t, eps, prediction)
    torch.testing.assert_close(loss, ((out - target) ** 2).sum() / 24)
    assert conjugate_velocity_loss(lambda x, s: target, schedule, x0, t, eps, prediction) == 0
    weight = normal(*x0.shape[:1], *[1] * (x0.ndim - 1), seed=3) ** 2
    weighted = conjugate_velocity_loss(model, schedule, x0, t, eps, prediction, weight)
    torch.testing.assert_close(weighted, (weight * (out - target) ** 2).sum() / 24)


def test_diffusion_loss_is_least_at_the_exact_denoiser():
    """For data N(0, s^2) the best linear v at step t is known; the loss has slope 0 there and only there.

    Four points with the exact second moments stand for the expectation.
    """
    schedule, step, s = Schedule(), 400, 0.7
    x0, eps = s * torch.tensor([1.0, 1, -1, -1]).double()[:, None], torch.tensor([1.0, -1, 1, -1]).double()[:, None]
    a, b = schedule.a[step], schedule.b[step]
    best = (a * s**2 - b) / (a**2 * s**2 + b**2)  # E[x_0 - eps | x_t] = best x_t
    for k, at_best in ((float(best), True), (float(best) + 0.1, False)):
        model = Scale(k)
        conjugate_velocity_loss(model, schedule, x0, torch.full((4,), step), eps).backward()
        assert (abs(model.k.grad) < 1e-12) == at_best


def test_low_precision_is_lifted_to_float32():
    schedule, t, seen = Schedule(), torch.tensor([5, 900]), []
    x = normal(2, 3, dtype=torch.bfloat16)

    def network(x_t, step):
        seen.append(x_t.dtype)
        return x_t.bfloat16()

    losses = [
        conjugate_velocity_loss(network, schedule, x, t, x),
        consistency_loss(network, network, network, schedule, x, torch.tensor([0, 40]), x),
        vsd_loss(x, network, lambda x_t, s: 0.5 * x_t, schedule, t, x)[0],
    ]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses) and set(seen) == {torch.float32}


# Eqs. 6-7


def exact_pair(schedule, grid, std=0.6):
    """The exact denoiser of N(0, std^2), and the consistency function of its DDIM walk down the grid to x_0.

    Both are linear in x: a DDIM step multiplies by a known factor, the consistency function by their product.
    """
    a = torch.cat([torch.ones(1), schedule.a])[[s + 1 for s in grid]].double()
    b = torch.cat([torch.zeros(1), schedule.b])[[s + 1 for s in grid]].double()
    k = a * std**2 / (a**2 * std**2 + b**2)
    factor = torch.ones(len(grid), dtype=torch.float64)
    for i in range(1, len(grid)):
        factor[i] = factor[i - 1] * (a[i - 1] * k[i] + b[i - 1] * (1 - a[i] * k[i]) / b[i])
    where = {s: i for i, s in enumerate(grid)}

    def rows(table, x_t, t):
        return torch.stack([table[where[int(s)]] for s in t]).reshape(-1, *[1] * (x_t.ndim - 1)) * x_t

    return lambda x_t, t: rows(k, x_t, t), lambda x_t, t: rows(factor, x_t, t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("m", [1, 5])
def test_consistency_loss_is_zero_at_the_exact_consistency_function(kind, loss, m):
    schedule, grid = Schedule(kind), [-1, *range(19, 1000, 20)]
    teacher, exact = exact_pair(schedule, grid)
    n = torch.arange(0, 51 - m)
    x0, eps = normal(len(n), 2, 3), normal(len(n), 2, 3, seed=1)
    # node -1 is never asked of a network; below it stands for t = 0, whose answer must not be used
    target = lambda x_t, t: torch.where(t[:, None, None] == 0, torch.nan, exact(x_t, torch.where(t == 0, 19, t)))
    value = consistency_loss(exact, target, teacher, schedule, x0, n, eps, m=m, loss=loss)
    assert value < 1e-20
    wrong = consistency_loss(lambda x, t: 1.1 * exact(x, t), target, teacher, schedule, x0, n, eps, m=m, loss=loss)
    assert wrong > 1e-4


def test_consistency_of_a_point_mass():
    """Data that is one point: teacher, student and target all say it, and every trajectory ends there."""
    schedule, point = Schedule("cogvideox"), normal(1, 3)
    say = lambda x_t, t: point.expand_as(x_t)
    n, eps = torch.tensor([0, 7, 45]), normal(3, 3, seed=1)
    assert consistency_loss(say, say, say, schedule, point.expand(3, 3), n, eps) == 0


def test_consistency_target_at_node_zero_is_the_denoised_x():
    """The anchor: at n = 0 it is the x_0 that the teacher says last; the target network has no part in it."""
    schedule, teacher, n = Schedule(), Scale(0.8), torch.tensor([0])
    x0, eps = normal(1, 4), normal(1, 4, seed=1)
    x = schedule.add_noise(x0, eps, 99)
    for t, t_next in ((99, 79), (79, 59), (59, 39), (39, 19)):
        x = schedule.ddim_step(x, 0.8 * x, t, t_next)
    never = lambda x_t, t: torch.full_like(x_t, torch.nan)
    for zero in (0.0, 1.0):  # a constant does not satisfy the loss
        value = consistency_loss(Scale(zero), never, teacher, schedule, x0, n, eps, loss="mse")
        start = schedule.add_noise(x0, eps, 99)
        torch.testing.assert_close(value, ((zero * start - 0.8 * x) ** 2).mean())


def test_consistency_calls_each_network_where_it_should():
    schedule, n, calls = Schedule(), torch.tensor([0, 2]), {"student": [], "target": [], "teacher": []}

    def record(name):
        def network(x_t, t):
            calls[name].append((t.tolist(), x_t))
            return 0.5 * x_t

        return network

    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    consistency_loss(*(record(name) for name in calls), schedule, x0, n, eps, m=3)
    assert [t for t, _ in calls["student"]] == [[59, 99]]  # nodes 3 and 5 of -1, 19, 39, ...
    assert [t for t, _ in calls["teacher"]] == [[59, 99], [39, 79], [19, 59]]
    assert [t for t, _ in calls["target"]] == [[0, 39]]  # row 0 is anchored
    torch.testing.assert_close(calls["student"][0][1], schedule.add_noise(x0, eps, torch.tensor([59, 99])))
    last = calls["teacher"][2][1]
    torch.testing.assert_close(calls["target"][0][1][1], schedule.ddim_step(last, 0.5 * last, 59, 39)[1])


def test_consistency_gradient_reaches_the_student_alone():
    schedule, nets = Schedule(), [Scale(0.3), Scale(0.5), Scale(0.7)]
    x0, eps = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    consistency_loss(*nets, schedule, x0.detach(), torch.tensor([0, 1, 20, 45]), eps).backward()
    student, target, teacher = nets
    assert student.k.grad.abs() > 1e-3 and target.k.grad is None and teacher.k.grad is None
    # the same network as student and target: the gradient still goes through the student's call only
    one, two, frozen = Scale(0.3), Scale(0.3), Scale(0.3)
    args = schedule, x0.detach(), torch.tensor([1, 1, 20, 45]), eps
    consistency_loss(one, one, nets[2], *args).backward()
    consistency_loss(two, frozen, nets[2], *args).backward()
    torch.testing.assert_close(one.k.grad, two.k.grad)


def test_huber_is_the_pseudo_huber_mean_over_elements():
    schedule, x0, n = Schedule(), torch.zeros(1, 5).double(), torch.tensor([0])
    d = torch.tensor([[0.0, 1e-6, 1e-3, 0.5, -20.0]]).double()
    say = lambda x_t, t: torch.zeros_like(x_t)
    for dtype in (torch.float64, torch.float32):
        zeros = x0.to(dtype)
        value = consistency_loss(lambda x_t, t: d.to(x_t), say, say, schedule, zeros, n, zeros)
        expected = ((d**2 + HUBER_C**2).sqrt() - HUBER_C).mean()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
    x = d.clone().requires_grad_()
    consistency_loss(lambda x_t, t: x, say, say, schedule, x0, n, x0).backward()
    torch.testing.assert_close(x.grad, d / (d**2 + HUBER_C**2).sqrt() / 5)
    assert (x.grad.abs() <= 1 / 5).all()


def test_consistency_refuses_what_is_outside_the_grid():
    schedule, net = Schedule(), Scale(0.5)
    x0, eps = normal(1, 3), normal(1, 3, seed=1)
    assert consistency_loss(net, net, net, schedule, x0, torch.tensor([49]), eps, m=1).isfinite()
    for n, m in ((50, 1), (49, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="n must be"):
            consistency_loss(net, net, net, schedule, x0, torch.tensor([n]), eps, m=m)
    with pytest.raises(ValueError, match="huber"):
        consistency_loss(net, net, net, schedule, x0, torch.tensor([0]), eps, loss="l1")


# Eqs. 10-13


def test_vsd_surrogate_has_the_gradient_of_its_definition():
    """dmd: g = (x_fake - x_real) / mean |x - x_real| for each sample; loss mean g^2 / 2, gradient g / numel."""
    schedule, t = Schedule(), torch.tensor([20, 500, 980])
    x, eps, x_real, x_fake = (normal(3, 2, 4, seed=s) for s in range(4))
    x = (x * torch.tensor([0.1, 1, 10]).double()[:, None, None]).requires_grad_()

    def say(answer):
        def network(x_t, step):
            assert not torch.is_grad_enabled() and torch.equal(step, t)
            torch.testing.assert_close(x_t, schedule.add_noise(x, eps, t).detach())
            return answer

        return network

    loss, info = vsd_loss(x, say(x_real), say(x_fake), schedule, t, eps)
    (grad,) = torch.autograd.grad(loss, x)
    scale = torch.stack([(x[i] - x_real[i]).abs().mean() for i in range(3)]).detach()[:, None, None]
    g = (x_fake - x_real) / scale
    torch.testing.assert_close(grad, g / 24)
    torch.testing.assert_close(loss, 0.5 * (g**2).mean())
    assert info["dropped"] == 0
    torch.testing.assert_close(info["score_gap"], (x_fake - x_real).abs().mean() / (x - x_real).abs().mean().detach())


def test_vsd_normaliser_has_a_floor():
    schedule, x = Schedule(), normal(1, 3).requires_grad_()
    loss, _ = vsd_loss(x, lambda *_: x, lambda *_: x + 1e-5, schedule, torch.tensor([500]), normal(1, 3, seed=1))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and (grad.abs() < 0.01).all() and (grad > 0).all()


def posterior_mean(schedule, mu, cov):
    """The exact denoiser of N(mu, cov) data, x (B, d)."""

    def predict(x_t, t):
        out = []
        for row, step in zip(x_t, t):
            a, b = schedule.a[step], schedule.b[step]
            noised = a**2 * cov + b**2 * torch.eye(len(mu), dtype=cov.dtype)
            out.append(mu + a * cov @ torch.linalg.solve(noised, row - a * mu))
        return torch.stack(out)

    return predict


def diffused_kl(schedule, step, mu_f, cov_f, mu_r, cov_r):
    """KL(N(a mu_f, a^2 cov_f + b^2) || N(a mu_r, a^2 cov_r + b^2)), by the textbook formula."""
    a, b, eye = schedule.a[step], schedule.b[step], torch.eye(len(mu_f), dtype=cov_f.dtype)
    f, r, d = a**2 * cov_f + b**2 * eye, a**2 * cov_r + b**2 * eye, a * (mu_r - mu_f)
    trace = torch.linalg.solve(r, f).trace() - len(mu_f)
    return 0.5 * (trace + d @ torch.linalg.solve(r, d) + torch.logdet(r) - torch.logdet(f))


GAUSSIANS = (
    torch.tensor([0.5, -1.0, 0.3]).double(),
    torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 1.1]]).double(),  # factor of the fake's covariance
    torch.tensor([-0.2, 0.4, 0.0]).double(),
    torch.tensor([[0.6, 0.1, 0.0], [0.1, 0.9, -0.2], [0.0, -0.2, 0.4]]).double(),
)


@pytest.mark.parametrize("kind", KINDS)
def test_score_weight_is_the_difference_of_the_diffused_log_densities(kind):
    """Sample by sample: d/dx [log p_fake(x_t) - log p_real(x_t)] with p fixed, x_t = a x + b eps, by autograd."""
    schedule, t = Schedule(kind), torch.tensor([20, 300, 700, 980])
    mu_f, factor, mu_r, cov_r = GAUSSIANS
    cov_f = factor @ factor.T
    x, eps = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    real, fake = posterior_mean(schedule, mu_r, cov_r), posterior_mean(schedule, mu_f, cov_f)
    loss, _ = vsd_loss(x, real, fake, schedule, t, eps, weight="score")
    (grad,) = torch.autograd.grad(loss, x)

    log_ratio = 0.0
    for i, step in enumerate(t):
        a, b = schedule.a[step], schedule.b[step]
        for sign, mu, cov in ((1, mu_f, cov_f), (-1, mu_r, cov_r)):
            noised = torch.distributions.MultivariateNormal(a * mu, a**2 * cov + b**2 * torch.eye(3))
            log_ratio = log_ratio + sign * noised.log_prob(a * x[i] + b * eps[i])
    (expected,) = torch.autograd.grad(log_ratio, x)
    torch.testing.assert_close(grad * x.numel(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [20, 500, 980])
def test_score_weight_is_the_gradient_of_the_diffused_kl(kind, step):
    """A Gaussian generator x = mu + L z: VSD's gradient of mu and L is that of the closed form of the KL.

    The gradient is a polynomial of degree 2 in (z, eps), so that a handful of points with the exact second moments
    gives the expectation without error: z and eps each run through +-sqrt(3) times the unit vectors.
    """
    schedule = Schedule(kind)
    mu_f, factor, mu_r, cov_r = GAUSSIANS
    mu, L = mu_f.clone().requires_grad_(), factor.clone().requires_grad_()
    expected = torch.autograd.grad(diffused_kl(schedule, step, mu, L @ L.T, mu_r, cov_r), (mu, L))

    axes = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    z, eps = axes.repeat_interleave(6, 0), axes.repeat(6, 1)  # (36, 3) each
    x = mu + z @ L.T
    real = posterior_mean(schedule, mu_r, cov_r)
    fake = posterior_mean(schedule, mu_f, factor @ factor.T)  # the fake score has followed the student
    loss, _ = vsd_loss(x, real, fake, schedule, torch.full((36,), step), eps, weight="score")
    grads = torch.autograd.grad(loss, (mu, L))
    for grad, truth in zip(grads, expected):
        torch.testing.assert_close(3 * grad, truth, rtol=1e-7, atol=1e-9)  # a mean over 3 elements, a KL of all of them


def test_vsd_is_still_at_the_solution_and_goes_to_it():
    """Equal scores: no gradient. Fake above real: the sample moves down, towards the real one."""
    schedule, t, eps = Schedule("cogvideox"), torch.tensor([20, 999]), normal(2, 3, seed=1)
    for weight in ("dmd", "score"):
        x = normal(2, 3).requires_grad_()
        loss, info = vsd_loss(x, Scale(0.5), Scale(0.5), schedule, t, eps, weight)
        assert loss == 0 and info["score_gap"] == 0 and not torch.autograd.grad(loss, x)[0].any()
        loss, _ = vsd_loss(x, lambda y, _: 0 * y, lambda y, _: 0 * y + 1, schedule, t, eps, weight)
        (grad,) = torch.autograd.grad(loss, x)
        assert (grad[0] > 0).all() and grad.isfinite().all()
    with pytest.raises(ValueError, match="weight"):
        vsd_loss(x, Scale(0.5), Scale(0.5), schedule, t, eps, "kl")


@pytest.mark.parametrize("weight", ["dmd", "score"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vsd_drops_and_counts_samples_that_are_not_finite(weight, bad):
    schedule, t = Schedule(), torch.tensor([100, 500, 900])
    x, eps, x_real, x_fake = (normal(3, 4, seed=s) for s in range(4))
    broken = x_real.clone()
    broken[1, 2] = bad
    x.requires_grad_()
    loss, info = vsd_loss(x, lambda *_: broken, lambda *_: x_fake, schedule, t, eps, weight)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(info["dropped"].item(), 1 / 3)
    assert info["score_gap"].isfinite() and not grad[1].any()
    keep = [0, 2]
    alone, _ = vsd_loss(x[keep], lambda *_: x_real[keep], lambda *_: x_fake[keep], schedule, t[keep], eps[keep], weight)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad, torch.autograd.grad(alone, x)[0])

    loss, info = vsd_loss(x, lambda *_: bad * x_real, lambda *_: x_fake, schedule, t, eps, weight)
    assert info["dropped"] == 1 and loss == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_vsd_gradient_reaches_neither_score():
    schedule, real, fake, student = Schedule(), Scale(0.5), Scale(0.7), Scale(1.0)
    x = student(normal(2, 3), None)
    vsd_loss(x, real, fake, schedule, torch.tensor([20, 980]), normal(2, 3, seed=1))[0].backward()
    assert student.k.grad.abs() > 0 and real.k.grad is None and fake.k.grad is None


# Eqs. 14-15


@pytest.mark.parametrize("with_text", [False, True])
def test_lrm_loss_teaches_the_lrm_and_not_the_student(with_text):
    lrm = TextImageLRM(channels=3, text_dim=5) if with_text else ImageLRM(channels=3)
    text = (normal(2, 4, 5, seed=1, dtype=torch.float32),) if with_text else ()
    x, reward = normal(2, 3, 2, 8, 8, dtype=torch.float32).requires_grad_(), torch.tensor([1.0, -2.0])
    loss = lrm_loss(lrm, x, reward, *text)
    torch.testing.assert_close(loss, ((lrm(x, *text) - reward) ** 2).mean())
    loss.backward()
    assert x.grad is None and all(p.grad is not None for p in lrm.parameters())
    with pytest.raises(ValueError, match="reward"):
        lrm_loss(lrm, x, reward[:, None], *text)


@pytest.mark.parametrize("with_text", [False, True])
def test_reward_loss_moves_the_student_and_not_the_lrm(with_text):
    lrm = TextImageLRM(channels=3, text_dim=5) if with_text else ImageLRM(channels=3)
    text = normal(2, 4, 5, seed=1, dtype=torch.float32) if with_text else None
    inputs = () if text is None else (text,)
    student, z = torch.nn.Conv3d(3, 3, 1), normal(2, 3, 2, 8, 8, dtype=torch.float32)
    x = student(z)
    x.retain_grad()
    loss = reward_loss(lrm, x, text)
    loss.backward()
    assert all(p.grad is None for p in lrm.parameters()) and all(p.grad.abs().max() > 0 for p in student.parameters())
    torch.testing.assert_close(loss, -lrm(x, *inputs).mean())
    here = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(-lrm(here, *inputs).mean(), here)
    torch.testing.assert_close(x.grad, expected)
    before = lrm(x, *inputs).mean().item()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.05 * p.grad / p.grad.norm()
    assert lrm(student(z), *inputs).mean().item() > before


def test_reward_loss_in_one_backward_pass_with_the_lrms_own_loss():
    """Eq. 16's weighted sum may be backpropagated once: neither loss leaks into the other's parameters."""
    lrm, x = ImageLRM(channels=3), normal(2, 3, 1, 8, 8, dtype=torch.float32).requires_grad_()
    (reward_loss(lrm, x) + lrm_loss(lrm, x, torch.zeros(2))).backward()
    together = [p.grad.clone() for p in lrm.parameters()], x.grad.clone()
    lrm.zero_grad()
    x.grad = None
    lrm_loss(lrm, x, torch.zeros(2)).backward()
    assert x.grad is None
    for a, p in zip(together[0], lrm.parameters()):
        torch.testing.assert_close(a, p.grad)
    reward_loss(lrm, x).backward()
    torch.testing.assert_close(together[1], x.grad)


def test_reward_loss_of_a_linear_reward_is_its_slope():
    slope, x = normal(1, 3, 2, 4, 4), normal(2, 3, 2, 4, 4, seed=1).requires_grad_()
    reward_loss(lambda y: (slope * y).flatten(1).sum(1), x).backward()
    torch.testing.assert_close(x.grad, -slope.expand_as(x) / 2)
    with torch.no_grad():
        assert reward_loss(lambda y: (slope * y).flatten(1).sum(1), x).isfinite()
