"""Gaussian paths: coefficients against autograd, and conversions among predictions against Gaussian marginals."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from fluxmatching import CosinePath, LinearPath, VarianceExplodingPath, VariancePreservingPath
from fluxmatching.flows.paths import PREDICTIONS, Path

F64 = torch.float64
PATHS = {
    "linear": LinearPath(),
    "linear to width 0.1": LinearPath(0.1),
    "cosine": CosinePath(),
    "variance preserving": VariancePreservingPath(),
    "variance exploding": VarianceExplodingPath(0.01, 30.0),
}
BY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
INSIDE = torch.tensor([0.03, 0.2, 0.5, 0.8, 0.97], dtype=F64)
MEAN, VARIANCE = torch.tensor([1.0, -0.5, 2.0], dtype=F64), torch.tensor([0.5, 1.0, 3.0], dtype=F64)


# At α = 0 nothing but the velocity knows the data, at σ = 0 nothing but the score the noise, unless σ' is infinite.
_NO_DATA = {(s, t) for s in ("score", "noise") for t in ("velocity", "denoiser")}
_NO_NOISE = {(s, "score") for s in ("velocity", "noise", "denoiser")}
UNDETERMINED = {
    ("LinearPath", 0.0): _NO_DATA,
    ("CosinePath", 0.0): _NO_DATA,
    ("LinearPath", 1.0): _NO_NOISE,
    ("CosinePath", 1.0): _NO_NOISE,
    ("VariancePreservingPath", 1.0): {
        ("noise", "score"), ("denoiser", "score"), ("noise", "velocity"), ("denoiser", "velocity"),
    },
}  # fmt: skip


def truth(path: Path, t: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Predictions for data N(MEAN, diag VARIANCE) and normal noise: everything is Gaussian."""
    c = path.coefficients(t)
    alpha, sigma, alpha_rate, sigma_rate = (n.unsqueeze(-1) for n in c[:4])
    spread = alpha**2 * VARIANCE + sigma**2
    away = x - alpha * MEAN
    denoiser, noise = MEAN + alpha * VARIANCE / spread * away, sigma / spread * away
    return {
        "score": -away / spread,
        "noise": noise,
        "denoiser": denoiser,
        "velocity": alpha_rate * denoiser + torch.where(noise == 0, noise, sigma_rate * noise),
    }


@BY_PATH
def test_rates_are_derivatives(path: Path) -> None:
    t = INSIDE.clone().requires_grad_()
    c = path.coefficients(t)
    for value, rate in ((c.alpha, c.alpha_rate), (c.sigma, c.sigma_rate), (c.sigma**2 / 2, c.sigma_sigma_rate)):
        found = torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else torch.zeros(5)
        torch.testing.assert_close(rate.detach(), found.to(F64), rtol=1e-12, atol=1e-13)


def test_ends() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    for path, alpha, sigma in (
        (LinearPath(), [0, 1], [1, 0]),
        (LinearPath(0.1), [0, 1], [1, 0.1]),
        (CosinePath(), [0, 1], [1, 0]),
        (VarianceExplodingPath(0.01, 30.0), [1, 1], [30, 0.01]),
    ):
        c = path.coefficients(ends)
        torch.testing.assert_close(c.alpha, torch.tensor(alpha, dtype=F64))
        torch.testing.assert_close(c.sigma, torch.tensor(sigma, dtype=F64))
    c = VariancePreservingPath(0.1, 20.0).coefficients(ends)
    torch.testing.assert_close(c.alpha, torch.tensor([math.exp(-20.1 / 4), 1.0], dtype=F64))
    assert c.sigma[1] == 0
    assert c.sigma_rate[1] == -math.inf
    torch.testing.assert_close(c.sigma_sigma_rate[1].item(), -0.05)
    torch.testing.assert_close((c.alpha**2 + c.sigma**2), torch.ones(2, dtype=F64))


@BY_PATH
@pytest.mark.parametrize(("source", "target"), list(permutations(PREDICTIONS, 2)))
def test_conversions_inside_the_path(path: Path, source: str, target: str) -> None:
    x = torch.randn(5, 3, dtype=F64)
    known = truth(path, INSIDE, x)
    found = path.convert(known[source], x, INSIDE, source=source, target=target)
    torch.testing.assert_close(found, known[target], rtol=1e-9, atol=1e-9)


@BY_PATH
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize(("source", "target"), list(permutations(PREDICTIONS, 2)))
def test_conversions_at_the_ends_have_their_limit_or_an_error(path: Path, end: float, source: str, target: str) -> None:
    """Never NaN: the value is that of the Gaussian at the end, or an error says what is not determined."""
    t = torch.full((4,), end, dtype=F64)
    x, beside = torch.randn(4, 3, dtype=F64), torch.full((4,), abs(end - 1e-9), dtype=F64)
    known, c = truth(path, t, x), path.coefficients(t)
    # The denoiser at σ = 0 is the sample itself; where σ' is infinite, the velocity is the limit of that beside it.
    if not known["velocity"].isfinite().all() or (c.sigma == 0).any():
        known["velocity"] = truth(path, beside, x)["velocity"]
    if (source, target) in UNDETERMINED.get((type(path).__name__, end), ()) and ((c.alpha == 0) | (c.sigma == 0)).any():
        with pytest.raises(ValueError, match=f"{source} does not determine {target} at t = {end:g}"):
            path.convert(known[source], x, t, source=source, target=target)
        return
    found = path.convert(known[source], x, t, source=source, target=target)
    torch.testing.assert_close(found, known[target], rtol=1e-5, atol=1e-5)


def test_what_a_prediction_does_not_determine() -> None:
    x, t = torch.randn(3, 2), torch.tensor([0.5, 0.0, 1.0])
    for source, target, time in (
        ("noise", "velocity", "0"),
        ("score", "denoiser", "0"),
        ("velocity", "score", "1"),
        ("denoiser", "score", "1"),
    ):
        with pytest.raises(ValueError, match=rf"Path.convert: {source} does not determine {target} at t = {time}"):
            LinearPath().convert(x, x, t, source=source, target=target)
    with pytest.raises(ValueError, match="denoiser does not determine velocity at t = 1"):
        VariancePreservingPath().convert(x, x, t, source="denoiser", target="velocity")


@BY_PATH
def test_samples_and_their_velocity(path: Path) -> None:
    x0, x1 = torch.randn(5, 2, 3, dtype=F64), torch.randn(5, 2, 3, dtype=F64)
    found, velocity = path.sample(x0, x1, INSIDE), path.conditional_velocity(x0, x1, INSIDE)
    step = 1e-6
    moved = path.sample(x0, x1, INSIDE + step) - path.sample(x0, x1, INSIDE - step)
    torch.testing.assert_close(velocity, moved / (2 * step), rtol=1e-6, atol=1e-5)
    for row, t in enumerate(INSIDE.tolist()):
        torch.testing.assert_close(found[row : row + 1], path.sample(x0[row : row + 1], x1[row : row + 1], t))


def test_float32_keeps_its_digits_near_the_data() -> None:
    t = torch.tensor([1 - 2.0**-20])
    for path in (LinearPath(), CosinePath(), VariancePreservingPath()):
        single, double = path.at("f", t, torch.zeros(1, 1)), path.coefficients(t.double())
        torch.testing.assert_close(single.sigma.flatten().double(), double.sigma, rtol=1e-6, atol=0)


def test_bad_arguments() -> None:
    x = torch.randn(4, 2)
    path = LinearPath()
    for t, error, text in (
        (1.5, ValueError, r"t must lie in \[0, 1\], got 1.5"),
        (torch.tensor([0.1, 0.2, -0.1, 0.3]), ValueError, r"t must lie in \[0, 1\], got -0.1"),
        (math.nan, ValueError, r"t must lie in \[0, 1\], got nan"),
        (torch.rand(3), ValueError, r"t must be one number or one per sample, shape \[4\], got \[3\]"),
        (torch.ones(4, dtype=torch.int64), TypeError, "t must be a floating tensor"),
        ("0.5", TypeError, "t must be a number or a tensor of times, got str"),
        (True, TypeError, "t must be a number or a tensor of times, got bool"),
    ):
        with pytest.raises(error, match=text):
            path.sample(x, x, t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x0 must have the shape of x1, \[4, 2\], got \[3, 2\]"):
        path.sample(x[:3], x, 0.5)
    with pytest.raises(TypeError, match="x0 must have the dtype of the first argument"):
        path.sample(x.double(), x, 0.5)
    with pytest.raises(ValueError, match="the velocity is infinite at t = 1"):
        VariancePreservingPath().conditional_velocity(x, x, 1.0)
    with pytest.raises(ValueError, match="target must be one of 'velocity'"):
        path.convert(x, x, 0.5, source="score", target="drift")
    with pytest.raises(ValueError, match=r"prediction must have the shape of x, \[4, 2\], got \[4, 1\]"):
        path.convert(x[:, :1], x, 0.5, source="score", target="noise")
    with pytest.raises(ValueError, match=r"sigma_min must lie in \[0, 1\)"):
        LinearPath(1.0)
    with pytest.raises(ValueError, match="0 < beta_min < beta_max"):
        VariancePreservingPath(2.0, 1.0)
