"""A field added to a trained score model (Appendix C.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxkernels.checks import check_number
from fluxmatching.field_modules import check_field
from fluxmatching.fields import call_field


class AugmentedField(nn.Module):
    """Field f = s + α v: a score model that is trained already, and a field v with ∇·(p v) = 0 added to it (Eq. 48).

    The stationary distribution of f is that of s, and the way to it is another. v is trained by `augmentation_loss(v,
    x, sigma)` with a term for what it is to be good for, such as `autocorrelation_loss(f, ...)`. f takes σ or not, as
    both parts do: f(z) = s(z) + α v(z), or f(z, σ) = s(z, σ) + α v(z, σ). The samplers and `NoiseAnnealedFluxMatching`
    take f(z, σ) as it is. At one noise level, samplers and losses that are functions take a function of z:

    >>> f = AugmentedField(field_from_diffusers("runs/pipeline"), v)  # doctest: +SKIP
    >>> loss = augmentation_loss(lambda z: f.v(z, sigma), x, sigma).mean()  # doctest: +SKIP
    >>> unadjusted_langevin(lambda z: f(z, sigma), x, step_size=0.1 * sigma**2, num_steps=100)  # doctest: +SKIP

    Losses that are modules, such as `FluxMatching`, register the parameters of their field. So they take f itself, or a
    module that holds it, and refuse a function that uses it:

    >>> class AtOneLevel(torch.nn.Module):  # doctest: +SKIP
    ...     def __init__(self, field, sigma):
    ...         super().__init__()
    ...         self.field, self.sigma = field, sigma
    ...
    ...     def forward(self, z):
    ...         return self.field(z, self.sigma)
    >>> FluxMatching(AtOneLevel(f, 0.5), 0.5)(x)  # doctest: +SKIP

    The score model is registered as it is, not copied, and **frozen in place**: at construction its parameters are set
    to require no gradient, and it is set to evaluation mode, where `train()` of the sum leaves it. Parameters that
    require a gradient and get none would stop DistributedDataParallel. To go on training a model of one's own, give
    `copy.deepcopy(score_model)`. Derivatives in z go through the score model. An optimizer takes
    `field.v.parameters()`.

    Args:
        score_model: s(z) or s(z, σ), a module, or a function without parameters, such as an exact score.
        v: v(z) or v(z, σ), likewise; returns the shape of z.
        scale: α, a finite number; 0 leaves the score, -1 turns the other way. It is kept as a buffer, `field.scale`: a
            part of the state_dict, which moves with the field; `field.scale.fill_(0.5)` changes it.

    Raises:
        TypeError: s or v is a function that uses a network, whose parameters would not be registered; or a wrong type.
        ValueError: scale is not finite.
    """

    score_model: Callable[..., Tensor]
    v: Callable[..., Tensor]
    scale: Tensor

    def __init__(self, score_model: Callable[..., Tensor], v: Callable[..., Tensor], scale: float = 1.0) -> None:
        super().__init__()
        name = type(self).__name__
        check_field(name, "score_model", score_model)
        check_field(name, "v", v)
        self.score_model, self.v = score_model, v
        self.register_buffer("scale", torch.tensor(check_number(name, "scale", scale)))
        if isinstance(score_model, nn.Module):
            score_model.requires_grad_(False).eval()

    @property
    def accepts_sigma_per_sample(self) -> bool:
        """True if both parts declare that they accept one σ per sample; a function without parameters need not."""
        parts = [part for part in (self.score_model, self.v) if isinstance(part, nn.Module)]
        return bool(parts) and all(getattr(part, "accepts_sigma_per_sample", False) for part in parts)

    def train(self, mode: bool = True) -> AugmentedField:
        """Set v to training or evaluation mode; the score model stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.score_model, nn.Module):
            self.score_model.eval()
        return self

    def forward(self, z: Tensor, *condition: Tensor | float) -> Tensor:
        """Return s + α v.

        Args:
            z: `[n, *event]`.
            condition: σ, if the score model and v take it: `[]`, or `[n]` where both accept that.

        Returns:
            `[n, *event]`.
        """
        return call_field(self.score_model, z, *condition) + self.scale * call_field(self.v, z, *condition)
