"""Sampling of flows against Gaussian flows, diffusions and densities that are known in closed form."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.common.mixture import GaussianMixture, triangle_means
from fluxmatching import ODESolver, log_likelihood, probability_flow
from fluxmatching.flows.guidance import GuidedField
from fluxmatching.flows.paths import CosinePath, LinearPath, VariancePreservingPath
from fluxmatching.sampling import flow
from fluxmatching.sampling.flow import SDEOptions, straightness

F64 = torch.float64
Field = Callable[[Tensor, Tensor], Tensor]
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
VARIANCE = torch.tensor([0.25, 1.5, 4.0], dtype=F64)
TIGHT = ODESolver("dopri8", rtol=1e-10, atol=1e-10)
MIXTURE = GaussianMixture(triangle_means(1.8), 0.225)
# At t = 0 the data have a factor of 4e-5, so that p_0 is standard normal.
VP = VariancePreservingPath(beta_max=40.0)


def at_one_time(field: Field) -> Field:
    """Return a field of one time, `[]`, as one that receives a time per sample, all equal."""
    if isinstance(field, nn.Module):
        return field

    def called(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        assert (t == t[0]).all()
        return field(x, t[0])

    return called


def integrate_flow(field: Field, x: Tensor, **options: Any) -> Tensor:
    return flow.integrate_flow(at_one_time(field), x, **options)


def stochastic_flow(field: Field, x: Tensor, *options: Any, **more: Any) -> Tensor:
    return flow.stochastic_flow(at_one_time(field), x, *options, **more)


def flow_log_likelihood(field: Field, x: Tensor, **options: Any) -> Tensor:
    return flow.flow_log_likelihood(at_one_time(field), x, **options)


def rectified_pairs(field: Field, x0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return flow.rectified_pairs(at_one_time(field), x0, **options)


def variance_at(t: float | Tensor) -> Tensor:
    """Variance of x_t on the linear path from N(0, I) to N(m, S)."""
    return t**2 * VARIANCE + (1 - t) ** 2


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Marginal velocity of that path."""
    return MEAN + (t * VARIANCE - (1 - t)) / variance_at(t) * (x - t * MEAN)


def state_at(t: float, x0: Tensor) -> Tensor:
    """Flow map of that velocity from time 0 to t."""
    return t * MEAN + variance_at(t).sqrt() * x0


def noise(n: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("backward", [False, True])
def test_fixed_steps_converge_with_their_order(method: str, order: int, backward: bool) -> None:
    """On the trigonometric path: on the linear one the midpoint method happens to have order 3 for Gaussians."""

    def state(t: float) -> Tensor:
        sin, cos = math.sin(math.pi / 2 * t), math.cos(math.pi / 2 * t)
        return sin * MEAN + (sin**2 * VARIANCE + cos**2).sqrt() * noise()

    def field(x: Tensor, t: Tensor) -> Tensor:
        sin, cos = (math.pi / 2 * t).sin(), (math.pi / 2 * t).cos()
        slope = sin * cos * (VARIANCE - 1) / (sin**2 * VARIANCE + cos**2)
        return math.pi / 2 * (cos * MEAN + slope * (x - sin * MEAN))

    start, end = (1.0, 0.0) if backward else (0.0, 1.0)
    errors = [
        (integrate_flow(field, state(start), start=start, end=end, solver=ODESolver(method, num_steps=n)) - state(end))
        for n in (40, 80)
    ]
    sizes = [error.norm().item() for error in errors]
    assert sizes[1] < {1: 2.0, 2: 5e-2, 4: 1e-5}[order]
    assert math.log2(sizes[0] / sizes[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3", "dopri5", "dopri8"])
def test_adaptive_methods_meet_the_flow_map_and_return(method: str) -> None:
    x0, solver = noise(), ODESolver(method, rtol=1e-5, atol=1e-5)
    x1 = integrate_flow(gaussian, x0, solver=solver)
    torch.testing.assert_close(x1, state_at(1, x0), rtol=0, atol=1e-3)
    torch.testing.assert_close(integrate_flow(gaussian, x1, start=1, end=0, solver=solver), x0, rtol=0, atol=1e-3)
    part = integrate_flow(gaussian, state_at(0.2, x0), start=0.2, end=0.7, solver=solver)
    torch.testing.assert_close(part, state_at(0.7, x0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [TIGHT, ODESolver("rk4", num_steps=200)])
@pytest.mark.parametrize("backward", [False, True])
def test_a_trajectory_is_exact_at_all_its_times(solver: ODESolver, backward: bool) -> None:
    """Also where the times are not those of the grid, and as near to each other as floats allow."""
    times = torch.tensor([0.0, 0.0625, 0.3, 0.3 + 1e-15, 0.6875, 1.0], dtype=F64)
    times = times.flip(0) if backward else times
    x0 = noise()
    found = integrate_flow(gaussian, state_at(times[0].item(), x0), times=times, solver=solver)
    exact = torch.stack([state_at(t, x0) for t in times.tolist()])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_times_on_the_grid_take_the_steps_of_the_whole() -> None:
    """Ten steps in five sections are ten steps, whatever the rounding of the sections' shares."""
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == ()
        assert t.dtype == x.dtype
        seen.append(t.item())
        return gaussian(x, t)

    times = torch.linspace(0, 1, 6, dtype=F64)
    solver = ODESolver("euler", num_steps=10)
    trajectory = integrate_flow(field, noise(), times=times, solver=solver)
    assert seen == pytest.approx([k / 10 for k in range(10)])
    torch.testing.assert_close(trajectory[-1], integrate_flow(gaussian, noise(), solver=solver))


@pytest.mark.parametrize(("method", "last"), [("euler", 0.9), ("midpoint", 0.95)])
def test_euler_and_midpoint_do_not_evaluate_the_end(method: str, last: float) -> None:
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.item())
        return -x / (1 - t)

    found = integrate_flow(field, noise(), solver=ODESolver(method, num_steps=10))
    assert max(seen) == pytest.approx(last)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", ["adaptive_heun", "dopri5", "dopri8", "heun", "rk4"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.9, 0.3)])
def test_the_field_is_called_within_the_times_only(method: str, ends: tuple[float, float]) -> None:
    """A slow field makes the trial step of an adaptive solver long: 0.01 |x|/|v|, here 10."""
    seen: list[float] = []

    def slow(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.item())
        return 1e-3 * x

    x = noise()
    solver = ODESolver(method, num_steps=7 if method in ("heun", "rk4") else None)
    found = integrate_flow(slow, x, start=ends[0], end=ends[1], solver=solver)
    assert min(ends) <= min(seen)
    assert max(seen) <= max(ends)
    torch.testing.assert_close(found, x * math.exp(1e-3 * (ends[1] - ends[0])), rtol=1e-8, atol=0)


def test_images_in_single_precision_without_a_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    for times in (None, torch.tensor([0.0, 0.5, 1.0])):
        found = integrate_flow(lambda z, t: weight * z * t, x, times=times)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        end = found if times is None else found[-1]
        torch.testing.assert_close(end, x.detach() * math.exp(0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", [TIGHT, ODESolver("rk4", num_steps=100)])
def test_likelihood_of_a_gaussian(divergence: str, solver: ODESolver) -> None:
    """The Jacobian is diagonal, so that a probe of signs has no variance either."""
    x = state_at(1, noise())
    found = flow_log_likelihood(gaussian, x, divergence=divergence, solver=solver)
    exact = (-(x - MEAN).square() / (2 * VARIANCE) - (2 * math.pi * VARIANCE).log() / 2).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-5)


def test_likelihood_at_an_earlier_time_and_of_another_base() -> None:
    x = state_at(0.8, noise())
    found = flow_log_likelihood(gaussian, x, end=0.8, divergence="exact", solver=TIGHT)
    spread = variance_at(0.8)
    exact = (-(x - 0.8 * MEAN).square() / (2 * spread) - (2 * math.pi * spread).log() / 2).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)
    still = flow_log_likelihood(lambda z, t: 0 * z, x, base_std=3.0)
    torch.testing.assert_close(still, (-x.square() / 18 - math.log(2 * math.pi * 9) / 2).sum(1))


def mixture_score(x: Tensor, t: Tensor) -> Tensor:
    """Score of x_t on the path VP to the mixture."""
    c = VP.coefficients(t.double())
    alpha, sigma = c.alpha.item(), c.sigma.item()
    return GaussianMixture(alpha * MIXTURE.means, alpha**2 * MIXTURE.variance + sigma**2).score(x)


def mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    return VP.convert(mixture_score(x, t), x, t, source="score", target="velocity")


def test_likelihood_of_a_mixture() -> None:
    x = MIXTURE.sample(100, torch.Generator().manual_seed(0))
    found = flow_log_likelihood(mixture_velocity, x, divergence="exact", solver=ODESolver("dopri5", 1e-6, 1e-6))
    torch.testing.assert_close(found, MIXTURE.log_density(x), rtol=0, atol=1e-4)


def test_hutchinson_is_right_on_average_and_repeats_with_a_generator() -> None:
    x, solver = MIXTURE.sample(1, torch.Generator().manual_seed(3)), ODESolver("rk4", num_steps=20)
    exact = flow_log_likelihood(mixture_velocity, x, divergence="exact", solver=solver)
    many = x.expand(1000, 2)
    draws, again = (
        flow_log_likelihood(mixture_velocity, many, generator=torch.Generator().manual_seed(1), solver=solver)
        for _ in range(2)
    )
    assert draws.std() > 0.01  # else this test would show nothing
    assert abs(draws.mean() - exact[0]).item() < 4 * (draws.std() / len(draws) ** 0.5).item() + 1e-3
    assert torch.equal(draws, again)


def test_likelihood_leaves_the_network_alone_and_needs_derivatives() -> None:
    net = nn.Linear(3, 3).double()
    found = flow_log_likelihood(lambda z, t: net(z), noise(), divergence="exact", solver=TIGHT)
    carried = torch.linalg.matrix_exp(-net.weight.detach())
    shift = torch.linalg.solve(net.weight.detach(), net.bias.detach())
    x0 = (noise() + shift) @ carried.T - shift
    exact = -x0.square().sum(1) / 2 - 1.5 * math.log(2 * math.pi) - net.weight.detach().trace()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    assert net.weight.grad is None
    assert not found.requires_grad
    with pytest.raises(RuntimeError, match="flow_log_likelihood: the field's result does not depend on x"):
        flow_log_likelihood(lambda z, t: z.detach(), noise())


def moments(g: float, steps: int, ends: tuple[float, float]) -> Tensor:
    """Variance at the end of the Euler-Maruyama steps, which are affine in x: exact for the number of steps."""
    variance, h = variance_at(ends[0]), (ends[1] - ends[0]) / steps
    for k in range(steps):
        t = ends[0] + k * h
        slope = (t * VARIANCE - (1 - t)) / variance_at(t) * h - abs(h) * g**2 / (2 * variance_at(t))
        last = k == steps - 1 and ends[1] == 1
        variance = (1 + slope) ** 2 * variance + (0 if last else g**2 * abs(h))
    return variance


@pytest.mark.parametrize("g", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.0, 0.5), (0.9, 0.1)])
def test_marginals_of_the_diffusion_do_not_depend_on_it(g: float, ends: tuple[float, float]) -> None:
    n, steps = 8000, 200
    x = state_at(ends[0], noise(n, seed=1))
    found = stochastic_flow(
        gaussian,
        x,
        LinearPath(),
        SDEOptions(g, steps),
        start=ends[0],
        end=ends[1],
        generator=torch.Generator().manual_seed(2),
    )
    exact = variance_at(ends[1])
    torch.testing.assert_close(moments(g, steps, ends), exact, rtol=0.07, atol=0)  # what the steps' length costs
    assert ((found.mean(0) - ends[1] * MEAN).abs() < 4 * (exact / n).sqrt()).all()
    relative = found.var(0) / moments(g, steps, ends) - 1
    assert relative.abs().max() < 4 * (2 / n) ** 0.5


def test_the_error_of_the_diffusion_falls_with_the_length_of_its_steps() -> None:
    errors = [(moments(1.0, steps, (0.0, 1.0)) - VARIANCE).abs().max().item() for steps in (200, 400, 800)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "denoiser"])
def test_steps_of_the_diffusion_by_hand(prediction: str) -> None:
    """Two steps from any of the predictions; the one to t = 1 has no noise, and g is a function of t."""
    path, x = CosinePath(), noise(6)

    def score(z: Tensor, t: float) -> Tensor:
        return -z / (0.5 * math.sin(math.pi / 2 * t) ** 2 + math.cos(math.pi / 2 * t) ** 2)

    def velocity(z: Tensor, t: float) -> Tensor:
        sin, cos = math.sin(math.pi / 2 * t), math.cos(math.pi / 2 * t)
        return math.pi / 2 * (cos / sin * z + (cos**2 * cos / sin + sin * cos) * score(z, t))

    def field(z: Tensor, t: Tensor) -> Tensor:
        return path.convert(score(z, t.item()), z, t, source="score", target=prediction)

    seen: list[int] = []
    options = SDEOptions(lambda t: 2 - t, num_steps=2, prediction=prediction)
    found = stochastic_flow(
        field,
        x,
        path,
        options,
        start=0.5,
        generator=torch.Generator().manual_seed(4),
        callback=lambda k, z: seen.append(k),
    )
    draw = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    hand = x + 0.25 * velocity(x, 0.5) + 0.125 * 1.5**2 * score(x, 0.5) + 1.5 * 0.5 * draw
    hand = hand + 0.25 * velocity(hand, 0.75) + 0.125 * 1.25**2 * score(hand, 0.75)
    torch.testing.assert_close(found, hand)
    assert seen == [1, 2]


def test_a_diffusion_that_vanishes_with_sigma_samples_a_point() -> None:
    """Data at one point: with g constant the steps near t = 1 would multiply the deviation by 1 - g²/(2 h)."""
    point = torch.tensor([2.0, -1.0])
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    options = SDEOptions(lambda t: math.sqrt(1 - t), num_steps=50, prediction="denoiser")
    end = stochastic_flow(lambda z, t: point.expand_as(z), x, LinearPath(), options)
    assert (end - point).abs().max() < 0.3


def test_pairs_in_chunks_are_those_of_the_flow(capsys: pytest.CaptureFixture[str]) -> None:
    x0 = noise(7).requires_grad_()
    sizes: list[int] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return gaussian(x, t)

    start, end = rectified_pairs(field, x0, solver=ODESolver("rk4", num_steps=50), chunk_size=3)
    assert set(sizes) == {3, 1}
    assert torch.equal(start, x0)
    assert not start.requires_grad
    assert not end.requires_grad
    torch.testing.assert_close(end, integrate_flow(gaussian, x0, solver=ODESolver("rk4", num_steps=50)))
    assert capsys.readouterr().err == ""
    rectified_pairs(gaussian, x0, chunk_size=4, progress=True)
    assert "2/2" in capsys.readouterr().err


def turning(speed: float) -> Callable[[Tensor, Tensor], Tensor]:
    generator = speed * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    return lambda x, t: x @ generator.T


@pytest.mark.parametrize("backward", [False, True])
def test_straightness_of_lines_and_rotations(backward: bool) -> None:
    x, speed = torch.randn(20, 2, dtype=F64), 2.0
    times = torch.linspace(0, 1, 401, dtype=F64)
    times = times.flip(0) if backward else times
    line = x + times.reshape(-1, 1, 1) * torch.randn(20, 2, dtype=F64)
    torch.testing.assert_close(straightness(line, times), torch.zeros((), dtype=F64))
    trajectory = integrate_flow(turning(speed), x, times=times[::100], solver=TIGHT)
    radius2 = x.square().sum(1).mean()
    chord = 4 * math.sin(speed / 8) ** 2 * 16  # squared speed along the chords of quarters
    exact = radius2 * (chord - 4 * math.sin(speed / 2) ** 2)
    torch.testing.assert_close(straightness(trajectory, times[::100]), exact)
    fine = integrate_flow(turning(speed), x, times=times, solver=ODESolver("rk4", num_steps=400))
    torch.testing.assert_close(
        straightness(fine, times), radius2 * (speed**2 - 4 * math.sin(speed / 2) ** 2), rtol=1e-4, atol=0
    )


def test_straightness_weighs_times_by_their_distance() -> None:
    """One dimension: x = 0, 1, 1 at t = 0, 0.25, 1; speeds 4 and 0 against a mean of 1."""
    trajectory = torch.tensor([0.0, 1.0, 1.0]).reshape(3, 1, 1).expand(3, 5, 1)
    found = straightness(trajectory, torch.tensor([0.0, 0.25, 1.0]))
    assert found.item() == pytest.approx(0.25 * 3**2 + 0.75 * 1**2)


class Labeled(nn.Module):
    """v(x, t, labels) = weight of the label times x + t, which keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=F64))  # the last is of no label
        self.calls: list[tuple[int, torch.Size]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert labels.dtype == torch.int64
        assert labels.shape == x.shape[:1]
        assert t.dtype == x.dtype
        self.calls.append((len(x), t.shape))
        return self.weights[labels].unsqueeze(1) * x + t.reshape(-1, 1)


@pytest.mark.parametrize("labels", [2, torch.tensor([0, 2, 1, 0])])
@pytest.mark.parametrize("t", [0.25, torch.tensor(0.25), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)])
@pytest.mark.parametrize("scale", [0, 1, 3.5, -1.0])
def test_guidance_is_the_formula_in_one_call(labels: int | Tensor, t: float | Tensor, scale: float) -> None:
    net, x = Labeled(), noise(4)
    found = GuidedField(net, labels, scale, num_classes=3)(x, t)
    given = net.weights[torch.as_tensor(labels).expand(4)].unsqueeze(1)
    times = torch.as_tensor(t, dtype=F64).reshape(-1, 1)
    torch.testing.assert_close(found, (0.5 + scale * (given - 0.5)) * x + times)
    n, shape = net.calls[0]
    assert len(net.calls) == 1
    assert n == (4 if scale in (0, 1) else 8)
    assert shape == (n,)


def test_a_guided_field_is_integrated_and_owns_the_parameters_of_its_network() -> None:
    net, x = Labeled(), noise(4)
    field = GuidedField(net, torch.tensor([0, 2, 1, 0]), 2.0, num_classes=3)
    assert dict(field.named_parameters()) == {"field.weights": net.weights}
    assert set(field.state_dict()) == {"field.weights"}
    rate = (0.5 + 2 * (net.weights.detach()[[0, 2, 1, 0]] - 0.5)).unsqueeze(1)
    found = integrate_flow(lambda z, t: field(z, t) - t, x, solver=TIGHT)
    torch.testing.assert_close(found, x * rate.exp())
    density = flow_log_likelihood(field, x, divergence="exact")
    assert density.isfinite().all()
    path = LinearPath()
    assert stochastic_flow(field, x, path, SDEOptions(0.5, 4)).isfinite().all()
    field(x, 0.5).sum().backward()
    assert net.weights.grad is not None


def test_bad_guidance() -> None:
    for labels in (3, -1, 10**30, torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"GuidedField: labels must lie in \[0, 3\), got"):
            GuidedField(Labeled(), labels, 1.0, 3)
    for labels in (True, 1.0, torch.ones(2), [0, 1]):
        with pytest.raises(TypeError, match="GuidedField: labels must be an integer or an int64 tensor, got"):
            GuidedField(Labeled(), labels, 1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels must have shape \[\] or \[N\], got \[2, 1\]"):
        GuidedField(Labeled(), torch.zeros(2, 1, dtype=torch.int64), 1.0, 3)
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        GuidedField(Labeled(), 0, math.nan, 3)
    with pytest.raises(TypeError, match="field must be callable, got int"):
        GuidedField(3, 0, 1.0, 3)  # type: ignore[arg-type]
    field = GuidedField(Labeled(), torch.tensor([0, 1]), 2.0, 3)
    with pytest.raises(ValueError, match=r"labels must be one number or one per sample of x, shape \[4\], got \[2\]"):
        field(noise(4), 0.5)
    with pytest.raises(ValueError, match=r"GuidedField: t must lie in \[0, 1\], got 1.5"):
        field(noise(2), 1.5)
    with pytest.raises(ValueError, match="field must return the shape of its input"):
        GuidedField(lambda z, t, labels: z[:1], 0, 2.0, 3)(noise(2), 0.5)


def test_solvers_check_their_steps() -> None:
    with pytest.raises(ValueError, match="num_steps of method 'euler' must be a positive integer, got None"):
        ODESolver("euler")
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_steps of method 'rk4' must be a positive integer, got"):
            ODESolver("rk4", num_steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_steps must be None for method 'dopri5', .* 'heun', 'rk4' take fixed"):
        ODESolver("dopri5", num_steps=10)
    fixed = ODESolver("heun", num_steps=10)
    with pytest.raises(ValueError, match=r"probability_flow: solver must be adaptive, got method 'heun', .* edm_heun"):
        probability_flow(gaussian, noise(), solver=fixed)
    with pytest.raises(ValueError, match="log_likelihood: solver must be adaptive, got method 'heun'"):
        log_likelihood(gaussian, noise(), solver=fixed)


@pytest.mark.parametrize(
    "times", [[0.0, 1.5], [-0.1, 1.0], [0.0, 0.5, 0.5], [0.0, 0.6, 0.4], [0.0, math.nan], [0.5], [[0.0, 1.0]]]
)
def test_bad_times(times: list[float]) -> None:
    wanted = "times must be at least two increasing or decreasing numbers in"
    with pytest.raises(ValueError, match=f"integrate_flow: {wanted}"):
        integrate_flow(gaussian, noise(), times=torch.tensor(times))
    with pytest.raises(ValueError, match=f"straightness: {wanted}"):
        straightness(torch.ones(2, 3, 4), torch.tensor(times))


def test_bad_input_of_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise()
    options = SDEOptions(1.0, 4)
    for bad, match in ((x * math.nan, "x must be finite"), (x[0], r"x must have shape \[N, \*event\]")):
        for call in (
            lambda z: integrate_flow(gaussian, z),
            lambda z: stochastic_flow(gaussian, z, LinearPath(), options),
            lambda z: flow_log_likelihood(gaussian, z),
            lambda z: rectified_pairs(gaussian, z),
        ):
            with pytest.raises(ValueError, match=match.replace("x must", r"x0? must")):
                call(bad)
    for start, end in ((0.0, 1.5), (-0.5, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"integrate_flow: (start|end) must be a number in \[0, 1\], got"):
            integrate_flow(gaussian, x, start=start, end=end)
    with pytest.raises(ValueError, match=r"start and end must be different, got 1.0 for both"):
        integrate_flow(gaussian, x, start=1.0)
    with pytest.raises(TypeError, match="stochastic_flow: end must be a number"):
        stochastic_flow(gaussian, x, LinearPath(), options, end="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"give times or start and end, not both, got start 0\.2 and end 1\.0"):
        integrate_flow(gaussian, x, start=0.2, times=torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="rectified_pairs: solver must be an ODESolver, got 'rk4'"):
        rectified_pairs(gaussian, x, solver="rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        rectified_pairs(gaussian, x, chunk_size=0)
    with pytest.raises(ValueError, match="field must return the shape of its input"):
        integrate_flow(lambda z, t: z[:, :1], x)
    with pytest.raises(RuntimeError, match=r"integrate_flow: no step meets .* at t 0; is the field finite there"):
        integrate_flow(lambda z, t: z * math.nan, x)
    with pytest.raises(RuntimeError, match="integrate_flow: x must have values, by which the solver counts its steps"):
        integrate_flow(gaussian, torch.ones(2, 3, device="meta"), solver=ODESolver("rk4", num_steps=2))
    with pytest.raises(ValueError, match=r"flow_log_likelihood: end must be a number in \[0, 1\], got 1.5"):
        flow_log_likelihood(gaussian, x, end=1.5)
    with pytest.raises(ValueError, match="base_std must be a positive number, got 0"):
        flow_log_likelihood(gaussian, x, base_std=0.0)
    with pytest.raises(ValueError, match="divergence must be one of 'hutchinson', 'exact', got 'trace'"):
        flow_log_likelihood(gaussian, x, divergence="trace")
    with pytest.raises(ValueError, match=r"trajectory must have shape \[K, N, \*event\] with K = 2 times, got \[3, 4"):
        straightness(torch.ones(3, 4, 5), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="straightness: trajectory must be finite"):
        straightness(torch.full((2, 4, 5), math.nan), torch.tensor([0.0, 1.0]))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="integrate_flow needs torchdiffeq: pip install torchdiffeq"):
        integrate_flow(gaussian, x)


def test_bad_diffusions() -> None:
    x = noise()
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="SDEOptions: diffusion must be a non-negative finite number, got"):
            SDEOptions(value, 10)
    with pytest.raises(TypeError, match="diffusion must be a number or a function of t, got str"):
        SDEOptions("1", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got 0"):
        SDEOptions(1.0, 0)
    with pytest.raises(ValueError, match="prediction must be one of 'velocity', 'score', 'noise', 'denoiser', got 'x'"):
        SDEOptions(1.0, 10, "x")
    with pytest.raises(ValueError, match=r"must be a non-negative finite number, got -0.5 at t = 0.5"):
        stochastic_flow(gaussian, x, LinearPath(), SDEOptions(lambda t: -t, 2))
    with pytest.raises(TypeError, match="stochastic_flow: options must be an SDEOptions, got 3"):
        stochastic_flow(gaussian, x, LinearPath(), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stochastic_flow: path must be a Path"):
        stochastic_flow(gaussian, x, "linear", SDEOptions(1.0, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score does not determine velocity at t = 0"):
        stochastic_flow(gaussian, x, LinearPath(), SDEOptions(1.0, 2, "score"))
    with pytest.raises(ValueError, match=r"velocity does not determine score at t = 1"):
        stochastic_flow(gaussian, x, LinearPath(), SDEOptions(1.0, 2), start=1.0, end=0.0)
