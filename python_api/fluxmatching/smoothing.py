"""Fields that hold without noise, and the density estimate at σ > 0 through which a flux loss sees them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fluxkernels import kde_log_density
from fluxkernels.checks import as_number_tensor, check_finite, check_positive, check_tensor, shape_of
from fluxmatching.field_modules import networks_of
from fluxmatching.fields import Field, call_field


class SmoothedField(nn.Module):
    """Field at noise σ of a field that is to hold for the data themselves, such as a mechanistic model.

        f_σ(z) = Σ_i w_i(z) f(r_i),   w_i(z) ∝ exp(-|z - r_i|²/2σ²)

    is the mean of f over the clean points that z may have come from. If f leaves the law p of the data in place, so
    does f_σ with p_σ; f itself does not. A flux loss at σ > 0 therefore compares f through it:

    >>> loss = flux_matching_loss(SmoothedField(model, data, sigma), x, sigma, refs=data)  # doctest: +SKIP

    Every call evaluates f at all reference points. Where the weights have few effective centers f_σ says little about
    f, see `effective_centers`; `dual_flux_loss` needs no noise.

    Args:
        field: f(x), x `[n, *event]`; a module, or a function without parameters.
        refs: points r, `[M, *event]`, samples of the data.
        sigma: σ > 0 in units of x.

    Raises:
        TypeError: the field is a function that uses a network; its parameters would not be registered.
        ValueError: refs has no points or values that are not finite, or σ is not positive.
    """

    refs: Tensor

    def __init__(self, field: Field, refs: Tensor, sigma: float) -> None:
        super().__init__()
        name = "SmoothedField"
        if not callable(field):
            raise TypeError(f"{name}: field must be callable, got {type(field).__name__}")
        if not isinstance(field, nn.Module) and networks_of(field):
            raise TypeError(f"{name}: field must be a torch.nn.Module, so that its parameters are registered")
        check_tensor(name, "refs", refs)
        if refs.ndim < 2:
            raise ValueError(f"{name}: refs must have shape [M, *event], got {shape_of(refs)}")
        check_finite(name, refs=refs)
        self.field, self.sigma = field, check_positive(name, "sigma", sigma)
        self.register_buffer("refs", refs.detach(), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return f_σ(z), `[n, *event]`."""
        if z.shape[1:] != self.refs.shape[1:]:
            raise ValueError(
                f"SmoothedField: z must have the event shape of refs, {shape_of(self.refs)}, got {shape_of(z)}"
            )
        refs = self.refs.to(z.dtype)
        center = refs.mean(0)
        points, near = (refs - center).flatten(1), (z - center).flatten(1)
        # |z - r|² without |z|², which all weights share.
        logits = (near @ points.T - points.square().sum(1) / 2) / self.sigma**2
        values = call_field(self.field, refs).flatten(1)
        return (logits.softmax(1) @ values).reshape(z.shape)


def effective_centers(z: Tensor, refs: Tensor, sigma: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Count the reference points that make up the density estimate at z: 1/Σ_i w_i(z)², between 1 and M.

    The weights w_i(z) ∝ exp(-|z - r_i|²/2σ²) say from which points z may have come. Where one of them has it all, the
    estimate knows the score, which points there, and nothing of the freedom that Flux Matching has beyond it.

    With the estimate p̂ at two bandwidths, 1/Σ w² = M (4πσ²)^{D/2} p̂_σ(z)²/p̂_{σ/√2}(z).

    Args:
        z: points, `[..., N, D]`.
        refs: reference points, `[..., M, D]`.
        sigma: σ > 0 in units of z, `[]`, or one per group, `[...]`.
        backend: see `fluxkernels.kde_score`.

    Returns:
        `[..., N]`.
    """
    variance = as_number_tensor("effective_centers", "sigma", sigma, like=z).square()
    wide = kde_log_density(z, refs, variance, backend=backend)
    narrow = kde_log_density(z, refs, variance / 2, backend=backend)
    M, D = refs.shape[-2:]
    constant = math.log(M) + D / 2 * (4 * math.pi * variance).log()[..., None]
    return (2 * wide - narrow + constant).exp().clamp(1, M)
