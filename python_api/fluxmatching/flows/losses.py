"""Conditional flow matching, one loss for velocities, scores, noise predictions and denoisers on every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from fluxkernels import philox
from fluxkernels.backend import check_backend
from fluxkernels.checks import can_check_values, check_choice, check_finite, check_seed, check_tensor, shape_of
from fluxmatching.distributed import rank_and_size, rank_seed
from fluxmatching.fields import finite_field, per_sample
from fluxmatching.flows.closed_form import check_refs, over_sigma, posterior_mean, posterior_mean_of_class
from fluxmatching.flows.couplings import Coupling, couple
from fluxmatching.flows.labels import check_labels
from fluxmatching.flows.paths import PREDICTIONS, Coefficients, LinearPath, Path, check_pairs, check_path, check_times
from fluxmatching.flows.times import Times, UniformTimes, check_distribution
from fluxmatching.losses.draws import seeded_start
from fluxmatching.losses.modules import Logged, LossModule, draw_from
from fluxmatching.losses.options import check_not_half, check_options
from fluxmatching.losses.reference_set import ReferenceSet

FlowField = Callable[..., Tensor]  # v(x, t), or v(x, t, labels); x `[N, *event]`, t and labels `[N]`


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Options of `conditional_flow_matching_loss`. Construction checks them.

    Attributes:
        path: α and σ of x_t = α x1 + σ x0.
        times: distribution of t.
        prediction: what the field returns: "velocity", "score", "noise" or "denoiser"; see `fluxmatching.flows.paths`.
        error: which of them the squared error is of; None for the prediction. A score with error "noise" is denoising
            score matching in its ε-form, with error "denoiser" in its x0-form.
        stable_target: regress on the posterior mean over the reference points, which has less variance, in place of
            the single sample (Eq. 60); with labels, over the reference points of the sample's class.
        num_classes: number of class labels; None for a field without labels.
        label_dropout: probability that a sample's label is replaced by `num_classes`, which stands for none, so that
            the field can be guided; see `GuidedField`.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Raises:
        ValueError, TypeError: a value out of its range; the message names it.
    """

    path: Path = LinearPath()
    times: Times = UniformTimes()
    prediction: str = "velocity"
    error: str | None = None
    stable_target: bool = False
    num_classes: int | None = None
    label_dropout: float = 0.1
    backend: str | None = None

    def __post_init__(self) -> None:
        name = "FlowOptions"
        check_path(name, self.path)
        check_distribution(name, self.times)
        check_choice(name, "prediction", self.prediction, PREDICTIONS)
        if self.error is not None:
            check_choice(name, "error", self.error, PREDICTIONS)
        if not isinstance(self.stable_target, bool):
            raise TypeError(f"{name}: stable_target must be True or False, got {self.stable_target!r}")
        classes = self.num_classes
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
            raise ValueError(f"{name}: num_classes must be None or a positive integer, got {classes!r}")
        dropout = self.label_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= dropout <= 1:
            raise ValueError(f"{name}: label_dropout must lie in [0, 1], got {dropout!r}")
        if self.backend is not None:
            check_backend(self.backend, f"{name}: backend")


def conditional_flow_matching_loss(
    field: FlowField,
    x1: Tensor,
    options: FlowOptions = FlowOptions(),
    *,
    x0: Tensor | None = None,
    t: float | Tensor | None = None,
    labels: Tensor | None = None,
    refs: Tensor | Sequence[Tensor] | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute the conditional flow matching loss, one number per sample (Lipman et al. 2023, Theorems 1 to 3).

    ℓ_i = |v(x_t, t) - (α' x1 + σ' x0)|² at x_t = α x1 + σ x0. Its minimum over v is the marginal velocity, which
    carries the distribution of x0 to that of x1. With normal x0 the same loss trains the other predictions.

    Args:
        field: v(x, t), or v(x, t, labels) with labels; x `[N, *event]`, t and labels `[N]`.
        x1: samples of the data, `[N, *event]`.
        options: path, times, prediction, labels; see `FlowOptions`.
        x0: samples of the source, shape of x1, each the partner of a row of x1. They may be data of another kind;
            then predictions other than the velocity have no such meaning. None draws normal noise.
        t: times in [0, 1], one number or one per sample, `[N]`. None draws them, one from each of N equally probable
            intervals.
        labels: classes of x1, int64 `[N]` in [0, num_classes).
        refs: reference points of the stable target, `[M, *event]`; default x1. With labels a list is required, the
            points of each class, `[M_k, *event]`. A sample whose label is dropped keeps the target of its class: given
            x_t, their mean over the classes is the marginal velocity, if classes are as frequent in refs as in the
            data.
        seed: makes noise, times and dropped labels by Philox. None draws a seed from torch's generator.

    Returns:
        `[N]`, summed over the event.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        fluxkernels.BackendError: the requested backend cannot run here.
    """
    function = "conditional_flow_matching_loss"
    check_options(function, options, FlowOptions)
    if not callable(field):
        raise TypeError(f"{function}: field must be callable, got {type(field).__name__}")
    check_tensor(function, "x1", x1)
    check_not_half(function, "x1", x1)
    _check_kind_of_refs(function, refs, options)
    key = philox.as_seed(check_seed(function, seed), x1.device)
    if x0 is not None and options.stable_target:
        raise ValueError(f"{function}: x0 must be None with stable_target, whose mean is for normal noise")
    x0 = seeded_start(x1, key) if x0 is None else x0
    check_pairs(function, x0, x1)
    check_finite(function, x0=x0, x1=x1)
    classes = _classes(function, labels, x1, options, key)
    times = draw_from(options.times, key, x1, philox.TIME, len(x1)) if t is None else check_times(function, t, x1)
    times = times.expand(len(x1))
    c = options.path.coefficients(times.double())
    broadcast = c.reshape_for(x1)
    x_t = (broadcast.alpha * x1 + broadcast.sigma * x0).detach()
    mean = _stable_mean(function, x_t, c, x1, refs, labels, options) if options.stable_target else None
    target = _target(function, c, x0, x1, mean, options, times)
    error = finite_field(function, field, x_t, times.to(x1.dtype), *classes) - target
    if options.error not in (None, options.prediction):
        scale = _error_scale(c, str(options.error), options.prediction)
        _check_finite(function, scale, f"the error of the {options.error} is not finite", times)
        error = error * per_sample(scale.to(x1.dtype), x1)
    return error.square().flatten(1).sum(1)


def _target(
    function: str,
    c: Coefficients,
    x0: Tensor,
    x1: Tensor,
    mean: Tensor | None,
    options: FlowOptions,
    times: Tensor,
) -> Tensor:
    """Return what the field regresses on, shape of x1, detached; mean is that of the stable target."""
    # In units of (x1, x0) the prediction is k1 x1 + k0 x0.
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    of_x1, of_x0 = {
        "velocity": (c.alpha_rate, c.sigma_rate),
        "score": (zero, -1 / c.sigma),
        "noise": (zero, one),
        "denoiser": (one, zero),
    }[options.prediction]
    _check_finite(function, of_x0, f"the {options.prediction} is not finite", times)
    k1, k0 = (per_sample(k.to(x1.dtype), x1) for k in (of_x1, of_x0))
    with torch.no_grad():
        if mean is not None:
            broadcast = c.reshape_for(x1)
            # From m the noise is x0 + (α/σ)(x1 - m), which keeps its digits where σ is small and m = x1.
            x0 = x0 + broadcast.alpha * over_sigma(x1 - mean, x1, broadcast.sigma)
            x1 = mean
        return (k1 * x1 + k0 * x0).detach()


def _check_kind_of_refs(function: str, refs: Tensor | int | Sequence[Tensor] | None, options: FlowOptions) -> None:
    """Raise ValueError unless refs are of the kind that the options need."""
    if refs is not None and not options.stable_target:
        raise ValueError(f"{function}: refs are those of the stable target; give them with stable_target=True")
    classes = options.num_classes
    if classes is None or not options.stable_target or (isinstance(refs, (list, tuple)) and len(refs) == classes):
        return
    got = f"{len(refs)} of them" if isinstance(refs, (list, tuple)) else type(refs).__name__
    raise ValueError(
        f"{function}: refs must be a list of {classes} tensors with labels, the reference points of each class, got "
        f"{got}"
    )


@torch.no_grad()
def _stable_mean(
    function: str,
    x_t: Tensor,
    c: Coefficients,
    x1: Tensor,
    refs: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None,
    options: FlowOptions,
) -> Tensor:
    """Return the mean of the reference points given x_t, and given the class of each sample if there are labels."""
    if labels is None:
        points = x1 if refs is None else check_refs(function, refs, x1, "x1")
        return posterior_mean(x_t, c, points, options.backend)
    assert isinstance(refs, (list, tuple))
    of_class = [check_refs(function, points, x1, "x1", name=f"refs[{k}]") for k, points in enumerate(refs)]
    return posterior_mean_of_class(x_t, c, of_class, labels, options.backend)


def _error_scale(c: Coefficients, error: str, prediction: str) -> Tensor:
    """Return the ratio of the error of one prediction to that of another at the same x; see `Path.convert`."""
    # δD = (σ/α) δε, δv = (W/α) δε with W = σ α' - α σ', δs = δε/σ, up to signs: limits where σ or α is 0.
    sigma, alpha = c.sigma, c.alpha
    both = sigma * c.alpha_rate - alpha * c.sigma_rate
    sigma_both = sigma.square() * c.alpha_rate - alpha * c.sigma_sigma_rate
    ratios = {
        ("denoiser", "noise"): (sigma, alpha),
        ("velocity", "noise"): (both, alpha),
        ("noise", "score"): (sigma, torch.ones_like(sigma)),
        ("velocity", "denoiser"): (both, sigma),
        ("denoiser", "score"): (sigma.square(), alpha),
        ("velocity", "score"): (sigma_both, alpha),
    }
    if (error, prediction) in ratios:
        above, below = ratios[error, prediction]
    else:
        below, above = ratios[prediction, error]
    return above / below


def _check_finite(function: str, numbers: Tensor, what: str, t: Tensor) -> None:
    if can_check_values(numbers) and not numbers.isfinite().all():
        raise ValueError(f"{function}: {what} at t = {t[~numbers.isfinite()][0].item():g}")


def _classes(
    function: str, labels: Tensor | None, x1: Tensor, options: FlowOptions, key: Tensor
) -> tuple[()] | tuple[Tensor]:
    """Return the labels that the field receives, some of them dropped; nothing for a field without labels."""
    classes = options.num_classes
    if (labels is None) != (classes is None):
        raise ValueError(f"{function}: give labels if and only if the options have num_classes")
    if labels is None or classes is None:
        return ()
    check_labels(function, labels, classes, x1)
    if not options.label_dropout:
        return (labels,)
    uniform = philox.uniform(key, (1, len(x1)), philox.LABEL, torch.float32)[0]
    return (torch.where(uniform < options.label_dropout, classes, labels),)


class FlowMatching(LossModule):
    """Conditional flow matching, `conditional_flow_matching_loss` as a module.

    Args:
        field: v(x, t), or v(x, t, labels) with labels; a module or function.
        options: path, times, prediction, labels; see `FlowOptions`.
        source: samples of the source, `[M, *event]`, of which each minibatch draws its x0; None for normal noise.
        coupling: pairs x0 with x1, such as `ExactCoupling()`; None leaves them independent.
        paired: whether the minibatch holds pairs, `[N, 2, *event]` with x0 first, such as those of `rectified_pairs`.
        refs: reference points of the stable target, see `ReferenceSet`; default: the minibatch. With labels a list of
            tensors, the fixed points of each class.
    """

    field: FlowField

    def __init__(
        self,
        field: FlowField,
        options: FlowOptions = FlowOptions(),
        *,
        source: Tensor | None = None,
        coupling: Coupling | None = None,
        paired: bool = False,
        refs: Tensor | int | Sequence[Tensor] | None = None,
    ) -> None:
        name = "FlowMatching"
        check_options(name, options, FlowOptions)
        _check_kind_of_refs(name, refs, options)
        of_class = refs if isinstance(refs, (list, tuple)) else ()
        for k, points in enumerate(of_class):  # the newest samples would be those of all classes
            check_tensor(name, f"refs[{k}]", points)
        gather = getattr(coupling, "gather_across_ranks", False)
        super().__init__(field, refs=None if of_class else refs, gather_across_ranks=gather)  # type: ignore[arg-type]
        if coupling is not None and (not callable(coupling) or isinstance(coupling, type)):
            raise TypeError(f"{name}: coupling must be a Coupling, such as ExactCoupling(), got {coupling!r}")
        if not isinstance(paired, bool):
            raise TypeError(f"{name}: paired must be True or False, got {paired!r}")
        if paired and (source is not None or coupling is not None):
            raise ValueError(f"{name}: pairs have their own source and coupling; give paired without them")
        if source is not None and not isinstance(source, Tensor):
            raise TypeError(f"{name}: source must be a tensor [M, *event] or None, got {type(source).__name__}")
        if options.stable_target and (source is not None or coupling is not None or paired):
            raise ValueError(f"{name}: stable_target is for independent normal noise: no source, coupling or pairs")
        self.options, self.coupling, self.paired = options, coupling, paired
        self.source = ReferenceSet(source)
        self.class_refs = nn.ModuleList(ReferenceSet(points) for points in of_class)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that labels may have."""
        return self.options.num_classes

    def forward(
        self, x: Tensor, *, labels: Tensor | None = None, seed: int | Tensor | None = None
    ) -> tuple[Tensor, Logged]:
        """Return the mean loss `[]` and {"loss", "t"}, t the mean time.

        Args:
            x: samples of the data, `[N, *event]`; or pairs, `[N, 2, *event]`.
            labels: classes of the samples, int64 `[N]`.
            seed: determines all random numbers, except those of dropout. None draws one from torch's generator.
        """
        shared = self.key(x, seed)
        key = rank_seed(shared, rank_and_size()[0]) if self.gather_across_ranks else shared
        x0, x1 = self._pairs(x, key, shared)
        t = draw_from(self.options.times, key, x1, philox.TIME, len(x1))
        refs = [points(x1) for points in self.class_refs] or self.refs(x1)
        given = {"x0": None if self.options.stable_target else x0, "t": t, "labels": labels, "seed": key}
        values = conditional_flow_matching_loss(self.field, x1, self.options, refs=refs, **given)
        loss = values.mean()
        return loss, {"loss": loss.detach(), "t": t.mean()}

    def _pairs(self, x: Tensor, key: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x0, x1): what is drawn follows from the seed of this process, the coupling from the shared one."""
        if self.paired:
            if x.ndim < 3 or x.shape[1] != 2:
                raise ValueError(f"FlowMatching: pairs must have shape [N, 2, *event], got {shape_of(x)}")
            return x[:, 0], x[:, 1]
        points = self.source(x)
        if points is None:
            x0 = seeded_start(x, key)
        else:
            check_refs("FlowMatching", points, x, "x", name="source")
            words = philox.bits(key, (1, len(x)), philox.SOURCE).flatten()[: len(x)]
            x0 = points[words % len(points)]
        return (x0, x) if self.coupling is None else couple(self.coupling, x0, x, seed=shared)
