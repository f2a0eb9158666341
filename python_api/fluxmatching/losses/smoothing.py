"""Fields that hold without noise, and the density estimate at σ > 0 through which a flux loss sees them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fluxkernels import kde_log_density
from fluxkernels.checks import as_number_tensor, check_finite, check_positive, check_tensor, shape_of
from fluxkernels.devices import no_autocast
from fluxmatching.field_modules import check_field
from fluxmatching.fields import Field, call_field
from fluxmatching.losses.options import check_not_half
from fluxmatching.losses.reference_set import ReferenceSet


class SmoothedField(nn.Module):
    """Field f_σ that the law p_σ of noised data keeps, made from a field f that the law p of the data keeps.

        f_σ(z) = Σ_i w_i(z) f(r_i),   w_i(z) ∝ exp(-|z - r_i|²/2σ²)

    is the mean of f over the clean points that z may have come from. If diffusion with drift f leaves p in place, then
    that with f_σ leaves p_σ in place, and that with f does not. So a flux loss at σ > 0 of a model that is to hold for
    the data themselves, such as a mechanistic one, takes f_σ:

    >>> loss = flux_matching_loss(SmoothedField(model, data, sigma), x, sigma, refs=data)  # doctest: +SKIP

    Every call evaluates f at all reference points. Where the weights have few effective centers f_σ says little about
    f, see `effective_centers`; `dual_flux_loss` needs no noise. A grouped loss has one density estimate per group, and
    this field one for all coordinates: it is not for grouped losses. The points are not in the module's state.

    Args:
        field: f(x), x `[n, *event]`; a module, or a function without parameters.
        refs: points r, `[M, *event]`, samples of the data.
        sigma: σ > 0 in units of x.

    Raises:
        TypeError: the field is a function that uses a network, whose parameters would not be registered.
        ValueError: refs has values that are not finite, or σ is not positive.
    """

    def __init__(self, field: Field, refs: Tensor, sigma: float) -> None:
        super().__init__()
        name = "SmoothedField"
        check_field(name, "field", field)
        check_tensor(name, "refs", refs)
        check_not_half(name, "refs", refs)
        if refs.ndim < 2:
            raise ValueError(f"{name}: refs must have shape [M, *event], got {shape_of(refs)}")
        check_finite(name, refs=refs)
        self.field, self.sigma, self.refs = field, check_positive(name, "sigma", sigma), ReferenceSet(refs)

    def forward(self, z: Tensor) -> Tensor:
        """Return f_σ(z), `[n, *event]`; z in float32 or float64."""
        name = "SmoothedField"
        check_tensor(name, "z", z)
        check_not_half(name, "z", z)
        refs = self.refs(z)
        assert refs is not None
        if z.shape[1:] != refs.shape[1:]:
            raise ValueError(f"{name}: z must have the event shape of refs, {shape_of(refs)}, got {shape_of(z)}")
        values = call_field(self.field, refs.to(z.dtype)).flatten(1)
        with no_autocast(z.device):
            # In float64: σ may be far below the spread of the points, and differences of products cancel.
            center = refs.double().mean(0)
            points, near = (refs.double() - center).flatten(1), (z.double() - center).flatten(1)
            # |z - r|² without |z|², which all weights share.
            logits = (near @ points.T - points.square().sum(1) / 2) / self.sigma**2
            return (logits.softmax(1).to(z.dtype) @ values).reshape(z.shape)


def effective_centers(z: Tensor, refs: Tensor, sigma: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Count the reference points that make up the density estimate at z: 1/Σ_i w_i(z)², between 1 and M.

    The weights w_i(z) ∝ exp(-|z - r_i|²/2σ²) say from which points z may have come. With one effective center the
    estimate is that of a single point, whose score points to it, and Flux Matching has no freedom beyond that.

    With the estimate p̂ at two bandwidths, 1/Σ w² = M (4πσ²)^{D/2} p̂_σ(z)²/p̂_{σ/√2}(z).

    Args:
        z: points, `[..., N, D]`.
        refs: reference points, `[..., M, D]`.
        sigma: σ > 0 in units of z: `[]`, or one per group, `[...]`, or one per point, `[..., N]`.
        backend: see `fluxkernels.kde_score`.

    Returns:
        `[..., N]`.
    """
    function = "effective_centers"
    for name, points in (("z", z), ("refs", refs)):
        check_tensor(function, name, points)
    variance = as_number_tensor(function, "sigma", sigma, like=z).square()
    wide = kde_log_density(z, refs, variance, backend=backend)
    narrow = kde_log_density(z, refs, variance / 2, backend=backend)
    M, D = refs.shape[-2:]
    constant = math.log(M) + D / 2 * (4 * math.pi * variance).log()
    if variance.shape != wide.shape:
        constant = constant[..., None]
    return torch.exp(2 * wide - narrow + constant).clamp(1, M)
