"""The schedule against closed forms: Gaussians, whose scores, marginals and posteriors are known exactly."""

import math

import pytest
import torch

from schedule import PREDICTIONS, STEPS, Schedule, ddim, denoise, few_step, guide, log_prob, simulate, timesteps

KINDS = ("ddpm", "cogvideox", "flow")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(schedule, mean, std):
    """The exact denoiser E[x_0 | x_t] of data N(mean, std^2), every element for itself."""

    def predict(x_t, t):
        a, b = schedule.ab(t, x_t)
        return mean + a * std**2 / (a**2 * std**2 + b**2) * (x_t - a * mean)

    return predict


# The tables


def test_ddpm_table_is_the_product_of_its_alphas():
    schedule, abar = Schedule(), 1.0
    assert schedule.a.dtype == schedule.b.dtype == torch.float64 and schedule.a.shape == schedule.b.shape == (STEPS,)
    for t in range(STEPS):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert schedule.a[t] ** 2 == pytest.approx(abar, rel=1e-12)
        assert schedule.b[t] ** 2 == pytest.approx(1 - abar, rel=1e-12)


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_cogvideox_table_is_that_of_diffusers(snr_shift):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False, snr_shift_scale=snr_shift,
    )  # fmt: skip
    schedule = Schedule("cogvideox", snr_shift)
    torch.testing.assert_close(schedule.a**2, reference.alphas_cumprod, rtol=0, atol=1e-7)
    for n in (1, 2, 3, 4, 7, 16, 50, 1000):
        reference.set_timesteps(n)
        assert timesteps(n) == reference.timesteps.tolist()

    x, u = normal(1, 2, 3, seed=1), normal(1, 2, 3, seed=2)
    reference.set_timesteps(50)
    for t, t_next in ((999, 979), (499, 479), (19, -1)):
        step = reference.step(u, t, x)
        x0 = schedule.to_x0(u, x, t, "velocity")
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=0, atol=1e-9)
        torch.testing.assert_close(schedule.ddim_step(x, x0, t, t_next), step.prev_sample, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "snr_shift, abar",
    [
        (3.0, {0: 0.9974543276, 19: 0.9465729792, 249: 0.3908897413, 499: 0.0959695617, 749: 0.0109658909, 999: 0}),
        (1.0, {0: 0.99915, 19: 0.9810104569, 249: 0.6541890065, 499: 0.2423591666, 749: 0.0331714828, 999: 0}),
    ],
)
def test_cogvideox_published_values(snr_shift, abar):
    schedule = Schedule("cogvideox", snr_shift)
    for t, value in abar.items():
        assert schedule.a[t] ** 2 == pytest.approx(value, abs=1e-10)
    assert schedule.a[999] == 0 and schedule.b[999] == 1


def test_flow_is_the_same_code_with_a_one_minus_b():
    schedule, t = Schedule("flow"), torch.tensor([0, 249, 999])
    x0, eps = normal(3, 4), normal(3, 4, seed=1)
    tau = (t[:, None] + 1) / 1000
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), (1 - tau) * x0 + tau * eps)
    # x_t moves on a straight line against the conjugate velocity: DDIM is then one Euler step
    x_t = schedule.add_noise(x0, eps, 799)
    x0_hat = schedule.to_x0(x0 - eps, x_t, 799, "conjugate")
    torch.testing.assert_close(schedule.ddim_step(x_t, x0_hat, 799, 399), x_t + 0.4 * (x0 - eps))


@pytest.mark.parametrize("kind", KINDS)
def test_minus_one_is_x0_itself(kind):
    schedule, x0, eps = Schedule(kind), normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(schedule.add_noise(x0, eps, -1), x0)
    mixed = schedule.add_noise(x0, eps, torch.tensor([-1, 999]))
    assert torch.equal(mixed[0], x0[0]) and torch.allclose(mixed[1], schedule.a[999] * x0[1] + schedule.b[999] * eps[1])
    for t in (999, 19):
        x_t = schedule.add_noise(x0, eps, t)
        assert torch.equal(schedule.ddim_step(x_t, x0, t, -1), x0)
        assert torch.equal(schedule.ddim_step(x_t, x0, t, -1, 1.0), x0)  # sigma = 0 there: no noise to ask for
        mean, std = schedule.posterior(x_t, x0, t, -1)
        torch.testing.assert_close(mean, x0, rtol=0, atol=1e-15)
        assert std == 0


# Conversions


def convert(schedule, pred, x_t, t, source, dest):
    """What a network of `dest` would have put out, where one of `source` has put out pred."""
    return schedule.target(schedule.to_x0(pred, x_t, t, source), schedule.to_eps(pred, x_t, t, source), t, dest)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_round_trip(kind):
    schedule = Schedule(kind)
    t = torch.arange(0, 999, 7)  # a, b > 0
    x0, eps = normal(len(t), 3), normal(len(t), 3, seed=1)
    x_t = schedule.add_noise(x0, eps, t)
    for source in PREDICTIONS:
        pred = schedule.target(x0, eps, t, source)
        torch.testing.assert_close(schedule.to_x0(pred, x_t, t, source), x0, rtol=0, atol=1e-10)
        torch.testing.assert_close(schedule.to_eps(pred, x_t, t, source), eps, rtol=0, atol=1e-10)
        for dest in PREDICTIONS:
            there = convert(schedule, pred, x_t, t, source, dest)
            torch.testing.assert_close(there, schedule.target(x0, eps, t, dest), rtol=0, atol=1e-10)
            back = convert(schedule, there, x_t, t, dest, source)
            torch.testing.assert_close(back, pred, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_steps_is_each_step_alone(kind):
    schedule, t, t_next = Schedule(kind), torch.tensor([999, 500, 19]), torch.tensor([749, 480, -1])
    x, x0, noise = (normal(3, 2, 1, 2, 2, seed=s) for s in range(3))
    batch = schedule.ddim_step(x, x0, t, t_next, 0.7, noise)
    mean, std = schedule.posterior(x, x0, t, t_next)
    assert std.shape == (3, 1, 1, 1, 1)
    for i in range(3):
        one = slice(i, i + 1)
        alone = schedule.ddim_step(x[one], x0[one], int(t[i]), int(t_next[i]), 0.7, noise[one])
        torch.testing.assert_close(batch[one], alone)
        torch.testing.assert_close(mean[one], schedule.posterior(x[one], x0[one], int(t[i]), int(t_next[i]))[0])
        for prediction in ("conjugate", "velocity", "sample"):
            both = schedule.to_x0(x0, x, t, prediction), schedule.to_x0(x0[one], x[one], int(t[i]), prediction)
            torch.testing.assert_close(both[0][one], both[1])


def test_conjugate_is_the_rectified_flow_at_the_conjugate_point():
    schedule, x0, eps, t = Schedule(), normal(1, 5), normal(1, 5, seed=1), 300
    a, b = schedule.a[t], schedule.b[t]
    gamma = a / (a + b)
    y = schedule.add_noise(x0, eps, t) / (a + b)
    torch.testing.assert_close(y, gamma * x0 + (1 - gamma) * eps)  # Eqs. 22-23
    torch.testing.assert_close(y + (1 - gamma) * (x0 - eps), x0)  # Eq. 25
    torch.testing.assert_close(schedule.to_x0(x0 - eps, (a + b) * y, t, "conjugate"), x0)  # Eq. 8


@pytest.mark.parametrize("kind", ["cogvideox", "flow"])
def test_pure_noise_never_divides_by_a(kind):
    schedule, t = Schedule(kind), torch.tensor([999, 500])
    x, pred = normal(2, 3), normal(2, 3, seed=1)
    for prediction in ("conjugate", "velocity", "sample"):
        assert schedule.to_x0(pred, x, t, prediction).isfinite().all()
        assert schedule.to_eps(pred, x, t, prediction).isfinite().all()
    for eta in (0.0, 1.0):
        assert schedule.ddim_step(x, pred, t, torch.tensor([749, -1]), eta, x).isfinite().all()
    assert all(y.isfinite().all() for y in schedule.posterior(x, pred, t, torch.tensor([749, -1])))
    assert torch.equal(schedule.to_eps(pred, x, 999, "epsilon"), pred)
    for step in (999, t):
        with pytest.raises(ValueError, match="a = 0"):
            schedule.to_x0(pred, x, step, "epsilon")


def test_dtype_follows_the_tensors():
    schedule, t = Schedule(), torch.tensor([3, 999])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = normal(2, 3, dtype=torch.float32).to(dtype)
        for step, step_next in ((t, t - 3), (500, 100)):
            mean, std = schedule.posterior(x, x, step, step_next)
            outs = [schedule.add_noise(x, x, step), schedule.ddim_step(x, x, step, step_next, 0.5, x), mean, mean * std]
            outs += [convert(schedule, x, x, step, s, d) for s in PREDICTIONS for d in PREDICTIONS]
            assert all(y.dtype == dtype for y in outs)


def test_bad_input_is_refused():
    schedule, x = Schedule(), normal(2, 3)
    for t in (
        -2,
        1000,
        torch.tensor([0, -2]),
        torch.tensor([0, 1000]),
        torch.tensor([1]),
        torch.tensor([1.0, 2.0]),
        1.5,
    ):
        with pytest.raises(ValueError):
            schedule.add_noise(x, x, t)
    with pytest.raises(ValueError):
        schedule.to_x0(x, x, 5, "noise")
    with pytest.raises(ValueError):
        schedule.to_eps(x, x, -1, "sample")
    for t, t_next in ((5, 5), (5, 6), (torch.tensor([5, 5]), torch.tensor([4, 5]))):
        with pytest.raises(ValueError):
            schedule.posterior(x, x, t, t_next)
    for eta, noise in ((-0.1, x), (1.1, x), (0.5, None)):
        with pytest.raises(ValueError):
            schedule.ddim_step(x, x, 5, 4, eta, noise)
    for steps in ([], [1, 2], [5, 5], [1000], [5, -1]):
        with pytest.raises(ValueError):
            ddim(lambda x, t: x, schedule, x, steps)
        with pytest.raises(ValueError):
            few_step(lambda x, t: x, schedule, x, steps, lambda i: x)
    for n in (0, 1001):
        with pytest.raises(ValueError):
            timesteps(n)
    with pytest.raises(ValueError):
        Schedule("cosine")


# One step: variance and posterior


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_keeps_the_marginal_for_any_eta(kind, eta):
    """With exact x_0 and eps, x_next = a' x_0 + N(0, b'^2): read off the coefficients of x_0, eps and the noise."""
    schedule = Schedule(kind)
    x0, eps, noise = torch.eye(3, dtype=torch.float64)[:, :, None].unbind(0)  # the step is linear: unit vectors
    for t, t_next in ((999, 979), (999, 749), (749, 499), (249, -1), (19, 0), (1, 0)):
        x_t = schedule.add_noise(x0, eps, t)
        on_x0, on_eps, on_noise = schedule.ddim_step(x_t, x0, t, t_next, eta, noise).flatten()
        a, b = (schedule.a[t_next], schedule.b[t_next]) if t_next >= 0 else (1.0, 0.0)
        assert on_x0 == pytest.approx(float(a), abs=1e-12)
        assert on_eps**2 + on_noise**2 == pytest.approx(float(b**2), abs=1e-12)
        assert (on_noise > 0) == (eta > 0 and t_next >= 0)


def test_the_printed_eq_5_breaks_the_variance():
    """The last line of Eq. 5 has sqrt(1 - abar') / sqrt(1 - abar) before x_t. With sigma = 0 it is right, else not."""
    schedule = Schedule()
    for t, t_next in ((999, 979), (749, 499), (19, 9)):
        a, b, a_next, b_next = schedule.a[t], schedule.b[t], schedule.a[t_next], schedule.b[t_next]
        alpha = (a / a_next) ** 2
        for sigma2 in (0.0, (1 - alpha) * b_next**2 / b**2):
            direction = (b_next**2 - sigma2) ** 0.5
            on_x_t = b_next / b  # as printed
            on_x0, on_eps = a_next - direction * a / b + on_x_t * a, on_x_t * b
            right = on_eps**2 + sigma2 == pytest.approx(float(b_next**2), rel=1e-9)
            assert right == (sigma2 == 0) and (on_x0 == pytest.approx(float(a_next), rel=1e-9)) == (sigma2 == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_gaussian_conditioning(kind):
    """(x_s, x_t) given x_0 is jointly Gaussian: build its covariance from the chain of single steps, and condition."""
    schedule = Schedule(kind)
    x0, x_t = normal(1, 4), normal(1, 4, seed=1)
    a, b = [1.0, *schedule.a.tolist()], [0.0, *schedule.b.tolist()]  # index t + 1
    for t, s in ((999, 749), (749, 499), (499, 249), (20, 19), (700, 3), (400, -1)):
        # one step at a time, Eq. 18: x_i = r_i x_{i-1} + N(0, v_i)
        variance, carried = b[s + 1] ** 2, 1.0
        for i in range(s + 2, t + 2):
            r = a[i] / a[i - 1]
            variance = r**2 * variance + (b[i] ** 2 - r**2 * b[i - 1] ** 2)
            carried *= r
        assert variance == pytest.approx(b[t + 1] ** 2, rel=1e-9)
        cov = torch.tensor([[b[s + 1] ** 2, carried * b[s + 1] ** 2], [carried * b[s + 1] ** 2, variance]])
        cov = cov.to(torch.float64)
        expected_mean = a[s + 1] * x0 + cov[0, 1] / cov[1, 1] * (x_t - a[t + 1] * x0)
        expected_var = cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1]
        mean, std = schedule.posterior(x_t, x0, t, s)
        torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-6)
        assert std**2 == pytest.approx(float(expected_var), rel=1e-5, abs=1e-7)


def test_posterior_of_neighbours_is_that_of_ddpm():
    """Eq. 27 with the roots it lacks in print: sqrt(abar_{t-1}) before x_0, sqrt(alpha_t) before x_t."""
    schedule, t = Schedule(), 600
    beta = 1e-4 + (0.02 - 1e-4) * t / 999
    abar, abar_before = schedule.a[t] ** 2, schedule.a[t - 1] ** 2
    x0, x_t = normal(1, 3), normal(1, 3, seed=1)
    mean, std = schedule.posterior(x_t, x0, t, t - 1)
    expected = beta * abar_before.sqrt() * x0 + (1 - beta) ** 0.5 * (1 - abar_before) * x_t
    torch.testing.assert_close(mean, expected / (1 - abar))
    torch.testing.assert_close(std**2, beta * (1 - abar_before) / (1 - abar))


def test_the_printed_eq_27_loses_the_signal():
    """From 749 to 499, E[x_499 | x_0] / x_0 should be a_499 = 0.280; the mean as printed keeps 0.059 of it."""
    schedule, one = Schedule(), torch.ones(1, 1, dtype=torch.float64)
    abar, abar_next = schedule.a[749] ** 2, schedule.a[499] ** 2
    alpha = abar / abar_next
    printed = (1 - alpha) * abar.sqrt() / (1 - abar) + abar.sqrt() * (1 - abar_next) / (1 - abar) * schedule.a[749]
    ours, _ = schedule.posterior(schedule.a[749] * one, one, 749, 499)
    assert printed == pytest.approx(0.059, abs=5e-4)
    assert ours.item() == pytest.approx(0.280, abs=5e-4) and ours.item() == pytest.approx(float(schedule.a[499]))


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_eta_one_samples_the_posterior(kind):
    schedule, x, x0, noise = Schedule(kind), *(normal(1, 4, seed=s) for s in range(3))
    for t, t_next in ((999, 749), (499, 249), (19, -1)):
        mean, std = schedule.posterior(x, x0, t, t_next)
        torch.testing.assert_close(schedule.ddim_step(x, x0, t, t_next, 1.0, noise), mean + std * noise)


def test_log_prob_is_that_of_the_normal_distribution():
    x, mean, std = normal(4, 3), normal(4, 3, seed=1), normal(4, 1, seed=2).abs() + 0.1
    torch.testing.assert_close(log_prob(x, mean, std), torch.distributions.Normal(mean, std).log_prob(x))
    for zero in (torch.zeros(()), std - std[0]):
        with pytest.raises(ValueError, match="std"):
            log_prob(x, mean, zero)


# Guidance and the network call


def test_guide():
    cond, uncond = normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(guide(cond, uncond, 0.0), cond)
    torch.testing.assert_close(guide(cond, uncond, -1.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 7.5), uncond + 8.5 * (cond - uncond))  # guidance_scale is 1 + w


@pytest.mark.parametrize("prediction", ["conjugate", "velocity", "sample"])
def test_denoise_guides_the_raw_output_in_one_call(prediction):
    schedule, calls = Schedule("cogvideox"), []

    def model(x, t, text):
        calls.append(len(x))
        assert t.dtype == torch.int64 and t.shape == (len(x),) and len(text) == len(x)
        return x * text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1) + t.reshape(-1, 1, 1, 1, 1) / 1000

    single = {"dtype": torch.float32}
    x, text, null = (
        normal(2, 3, 1, 2, 2, **single),
        normal(2, 4, 5, seed=1, **single),
        normal(1, 4, 5, seed=2, **single),
    )
    t = torch.tensor([999, 100])
    plain = denoise(model, schedule, x, t, text, prediction)
    assert calls == [2] and plain.dtype == torch.float32
    torch.testing.assert_close(plain, schedule.to_x0(model(x, t, text), x, t, prediction).float())
    empty = denoise(model, schedule, x, t, null.expand(2, 4, 5), prediction)
    torch.testing.assert_close(denoise(model, schedule, x, t, text, prediction, -1.0, null), empty)
    calls.clear()
    guided = denoise(model, schedule, x, t, text, prediction, 3.5, null)
    assert calls == [4]
    raw = guide(model(x, t, text), model(x, t, null.expand(2, 4, 5)), 3.5)
    torch.testing.assert_close(guided, schedule.to_x0(raw, x, t, prediction).float())
    torch.testing.assert_close(
        denoise(model, schedule, x, 100, text, prediction, 3.5, null)[1], guided[1], rtol=1e-5, atol=1e-5
    )
    half = denoise(lambda *a: model(*a).bfloat16(), schedule, x, t, text, prediction)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="null"):
        denoise(model, schedule, x, t, text, prediction, 1.0)


# Samplers


def test_timesteps_are_the_papers():
    assert timesteps(1) == [999] and timesteps(2) == [999, 499] and timesteps(4) == [999, 749, 499, 249]
    assert timesteps(50) == list(range(999, 0, -20)) and timesteps(1000) == list(range(999, -1, -1))
    assert all(len(set(timesteps(n))) == n and timesteps(n)[-1] >= 0 for n in range(1, 1001))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_from_the_exact_score_lands_on_the_gaussian(kind, eta):
    """Every step is affine, so mean and variance can be followed exactly: probe with the point 0 and unit vectors."""
    schedule, mean, std = Schedule(kind), 1.5, 0.5
    predict = gaussian(schedule, mean, std)

    def landing(steps):
        a, b = schedule.ab(steps[0], torch.zeros(1))
        # columns: the mean, and how far one unit of the start or of each step's noise carries to the end
        x = torch.zeros(len(steps) + 1, 1, dtype=torch.float64) + a * mean
        x[1] += (a**2 * std**2 + b**2).sqrt()  # start on the exact marginal of step 999

        def noise(i):
            unit = torch.zeros(len(steps) + 1, 1, dtype=torch.float64)
            unit[i + 2] = 1
            return unit

        start = x
        for i, (t, t_next) in enumerate(zip(steps, [*steps[1:], -1])):
            x0 = predict(x, torch.full((len(x),), t))
            x = schedule.ddim_step(x, x0, t, t_next, eta, noise(i)) if t_next >= 0 else x0
        if not eta:
            assert torch.equal(ddim(predict, schedule, start, steps), x)
        x = x.flatten()
        return float(x[0]), float((x[1:] - x[0]).norm())

    errors = []
    for n in (50, 1000):
        m, s = landing(timesteps(n))
        assert m == pytest.approx(mean, abs=1e-6)
        errors.append(abs(s - std))
    assert errors[1] < errors[0] / 8 and errors[1] < 0.012  # first order in the step


def test_nfe_and_the_last_output():
    schedule, x, seen = Schedule(), normal(2, 3), []

    def predict(x_t, t):
        assert t.dtype == torch.int64 and t.shape == (2,) and (t == t[0]).all()
        seen.append((int(t[0]), x_t, torch.tanh(x_t)))
        return seen[-1][2]

    for steps in ([999], [999, 749, 499, 249], timesteps(50)):
        for run in (
            lambda s: ddim(predict, schedule, x, s),
            lambda s: few_step(predict, schedule, x, s, lambda i: normal(2, 3, seed=i)),
            lambda s: few_step(predict, schedule, x, s, None, "ddim"),
        ):
            seen.clear()
            out = run(steps)
            assert [t for t, *_ in seen] == steps and seen[0][1] is x and out is seen[-1][2]


@pytest.mark.parametrize("kind", KINDS)
def test_renoising_gives_the_marginals_of_the_schedule(kind):
    """With an exact x_0, the input of step k is a x_0 + b noise of the step before, whatever happened earlier."""
    schedule, steps, truth = Schedule(kind), [999, 749, 499, 249], normal(1, 5)
    start = normal(1, 5, seed=9)
    noise = [normal(1, 5, seed=10 + i) for i in range(4)]
    for k in range(4):
        x = simulate(lambda x_t, t: truth, schedule, start, steps, k, lambda i: noise[i])
        expected = start if k == 0 else schedule.a[steps[k]] * truth + schedule.b[steps[k]] * noise[k - 1]
        torch.testing.assert_close(x, expected)
    # and by DDIM the noise of the start is kept
    eps = normal(1, 5, seed=3)
    x = schedule.add_noise(truth, eps, 999)
    x = simulate(lambda x_t, t: truth, schedule, x, steps, 3, None, "ddim")
    torch.testing.assert_close(x, schedule.add_noise(truth, eps, 249), rtol=1e-9, atol=1e-9)


def test_few_step_is_simulate_and_one_call_and_only_that_has_gradient():
    schedule, x, steps, weight = Schedule(), normal(2, 3), [999, 749, 499], torch.ones((), requires_grad=True)
    predict = lambda x_t, t: weight * torch.tanh(x_t)
    noise = lambda i: normal(2, 3, seed=i)
    x_k = simulate(predict, schedule, x, steps, 2, noise)
    assert not x_k.requires_grad
    out = few_step(predict, schedule, x, steps, noise)
    torch.testing.assert_close(out, predict(x_k, None))
    (slope,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(slope, torch.tanh(x_k).sum().float())
    for k, transition in ((3, "renoise"), (-1, "renoise"), (1, "euler")):
        with pytest.raises(ValueError):
            simulate(predict, schedule, x, steps, k, noise, transition)


def test_log_density_of_a_renoised_step_integrates_to_one():
    """exp(log_prob) of the transition to a step is a density: a sum over a fine grid gives 1."""
    schedule = Schedule()
    mean, std = schedule.posterior(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), 749, 499)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert float(log_prob(x, mean.item(), std).exp().sum() * (16 / 4000)) == pytest.approx(1, abs=1e-9)
    assert math.isclose(float(log_prob(mean, mean, std)), -math.log(float(std) * math.sqrt(2 * math.pi)))
