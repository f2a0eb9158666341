"""Error messages of every public loss begin with its own name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxmatching
from fluxmatching import (
    FlowOptions,
    FluxOptions,
    LinearFeatures,
    LossNormalizer,
    augmentation_loss,
    autocorrelation_loss,
    conditional_flow_matching_loss,
    dsm_loss,
    dual_flux_loss,
    flux_matching_loss,
    flux_target,
    marginal_velocity,
    mixing_loss,
    noise_annealed_flux_loss,
    quadratic_flux_loss,
    step_defect_loss,
    v_flux_loss,
)
from fluxmatching.losses.draws import Draws
from fluxmatching.velocity import SplicingField, splicing_loss

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
STABLE = FlowOptions(stable_target=True)


def field(z: Tensor, *condition: Tensor) -> Tensor:
    return -z


# Each with its field, samples, level or time, and the rest as keywords.
LOSSES: dict[str, Callable[..., Any]] = {
    "flux_matching_loss": flux_matching_loss,
    "flux_target": flux_target,
    "augmentation_loss": augmentation_loss,
    "dsm_loss": dsm_loss,
    "noise_annealed_flux_loss": lambda f, x, level, **more: noise_annealed_flux_loss(
        f, x, level, LossNormalizer(8), **more
    ),
    "mixing_loss": mixing_loss,
    "v_flux_loss": v_flux_loss,
    "conditional_flow_matching_loss": lambda f, x, level, **more: conditional_flow_matching_loss(
        f, x, **{"options": STABLE, "t": level, **more}
    ),
    "splicing_loss": lambda f, x, level, **more: splicing_loss(f, x, level, **more),
    "dual_flux_loss": lambda f, x, level, **more: dual_flux_loss(f, x, LinearFeatures(), **more),
    "quadratic_flux_loss": lambda f, x, level, **more: quadratic_flux_loss(f, x, **more),
    "autocorrelation_loss": lambda f, x, level, **more: autocorrelation_loss(f, x, **more),
    "step_defect_loss": step_defect_loss,
    "marginal_velocity": lambda f, x, level, refs=X, **more: marginal_velocity(x, level, refs, **more),
}
FLUX = ("flux_matching_loss", "flux_target", "augmentation_loss", "noise_annealed_flux_loss", "v_flux_loss")
WITHOUT_LEVEL = ("splicing_loss", "dual_flux_loss", "quadratic_flux_loss", "autocorrelation_loss")
WITH_REFS = (*FLUX, "dsm_loss", "dual_flux_loss", "conditional_flow_matching_loss", "marginal_velocity")
WITH_SEED = (*FLUX, "dsm_loss", "conditional_flow_matching_loss", "mixing_loss")

NAN = torch.full((8, 3), torch.nan)
BAD_X = [None, X.long(), X.to_sparse(), X[:0], NAN, X[:, 0], X.bfloat16()]
BAD_REFS = ["points", X.double(), X[:, :2], X[:0], NAN[:5], X.to_sparse()]
BAD_LEVEL = [None, "low", -1.0, torch.tensor(-1.0), torch.tensor([0.5, 0.5, 0.5]), torch.nan, torch.ones((), dtype=int)]


def check(name: str, *args: Any, **more: Any) -> None:
    """The call fails with a message that begins with that name."""
    if name == "mixing_loss":
        pytest.importorskip("geomloss")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{re.escape(name)}: "):
        LOSSES[name](*args, **more)


def test_all_public_losses_are_here() -> None:
    public = [name for name in fluxmatching.__all__ if name.endswith("_loss")]
    assert set(public) <= set(LOSSES)
    for name in public:
        assert inspect.isfunction(getattr(fluxmatching, name))


@pytest.mark.parametrize("x", BAD_X, ids=range(len(BAD_X)))
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "splicing_loss"])
def test_bad_samples(name: str, x: Any) -> None:
    if name in ("dsm_loss", "mixing_loss") and isinstance(x, Tensor) and x.dtype == torch.bfloat16:
        return  # which these take
    if name == "mixing_loss" and isinstance(x, Tensor) and x.ndim == 1:
        return  # numbers are samples too
    check(name, field, x, 0.5)


@pytest.mark.parametrize("refs", BAD_REFS, ids=range(len(BAD_REFS)))
@pytest.mark.parametrize("name", WITH_REFS)
def test_bad_reference_points(name: str, refs: Any) -> None:
    check(name, field, X, 0.5, refs=refs)


@pytest.mark.parametrize("level", BAD_LEVEL, ids=range(len(BAD_LEVEL)))
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_LEVEL])
def test_bad_noise_levels_and_times(name: str, level: Any) -> None:
    if name == "conditional_flow_matching_loss" and level is None:
        return  # which draws times
    check(name, field, X, level)


@pytest.mark.parametrize("name", WITH_SEED)
def test_bad_seeds_and_options(name: str) -> None:
    for seed in (0.5, torch.tensor(0.5), 2**64):
        check(name, field, X, 0.5, seed=seed)
    if name != "mixing_loss":
        check(name, field, X, 0.5, options=0.5)


@pytest.mark.parametrize("name", FLUX)
def test_bad_draws_and_fields_of_the_flux_losses(name: str) -> None:
    check(name, 3, X, 0.5)
    check(name, nn.BatchNorm1d(3), X, 0.5) if name in FLUX[:3] else check(name, Normed(), X, 0.5)
    check(name, field, X, 0.5, draws="draws")
    check(name, field, X, 0.5, draws=Draws(start=X[:3]))
    check(name, field, X, 0.5, draws=Draws(tau=torch.tensor(-1.0)))
    check(name, field, X, torch.tensor([0.3, 0.5, 0.7]), options=FluxOptions(strata=3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("splicing_loss", "marginal_velocity")])
def test_fields_that_are_not_finite(name: str, value: float) -> None:
    check(name, lambda z, *condition: torch.full_like(z, value), X, 0.5)


class Normed(nn.Module):
    """A field with a batch norm, of (z, σ) or (x, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.norm(z)


def test_messages_of_v_flux_matching() -> None:
    for module, x in (
        (fluxmatching.VFluxMatching(Normed()), X),
        (fluxmatching.VFluxMatching(field), NAN),
        (fluxmatching.VFluxMatching(field, refs=X[:, :2]), X),
        (fluxmatching.VFluxMatching(field, refs=X.double()), X),
        (fluxmatching.VFluxMatching(field), X.long()),
        (fluxmatching.VFluxMatching(field), X[:, 0]),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^VFluxMatching: "):
            module(x, seed=1)


def test_messages_of_the_splicing_loss() -> None:
    genes, cells = SplicingField(4), torch.rand(6, 4, 2)
    for x, sigma in ((None, 0.3), (cells[..., 0], 0.3), (cells * torch.nan, 0.3), (cells.long(), 0.3), (cells, -1.0)):
        with pytest.raises((ValueError, TypeError), match=r"^splicing_loss: "):
            splicing_loss(genes, x, sigma, seed=1)
    with pytest.raises(TypeError, match=r"^splicing_loss: seed"):
        splicing_loss(genes, cells, 0.3, seed=0.5)  # type: ignore[arg-type]
