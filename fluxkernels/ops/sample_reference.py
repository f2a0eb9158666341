"""Reference points drawn with the weights of a kernel."""

from torch import Tensor

from fluxkernels import philox
from fluxkernels.checks import check_seed, pick_backend
from fluxkernels.ops.kernel_average import Averaging, Weighting
from fluxkernels.ops.registration import Op


def _fake(
    z: Tensor,
    refs: Tensor,
    sigma2: Tensor,
    log_weights: Tensor | None,
    exclude_self: bool,
    kernel: str,
    seed: Tensor,
    backend: str,
) -> Tensor:
    return seed.new_empty(z.shape[:2])


sample_reference_op = Op(
    "sample_reference",
    "(Tensor z, Tensor refs, Tensor sigma2, Tensor? log_weights, bool exclude_self, str kernel, Tensor seed, "
    "str backend) -> Tensor",
    _fake,
)


def sample_reference(
    x: Tensor,
    refs: Tensor,
    sigma2: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool = False,
    kernel: str = "gaussian",
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Index of a reference point per query, drawn with the weights of `kernel_average`.

    r_j for the index j is a sample of the posterior of the clean data given x, if x is a noisy one of the reference
    points. With `log_weights` of zeros and a large σ² it is a bootstrap.

    The index is argmax_j (logit_j + G_j), G standard Gumbel numbers: one pass, and no matrix of weights. G is made of
    uniform numbers of 32 bits, so a probability is right within about 2⁻³² times the number of reference points.

    Args:
        x, refs, sigma2, log_weights, exclude_self, kernel: as for `kernel_average`.
        seed: seed of the draws (Philox; same indices on every device and backend, but where two reference points are
            equal up to rounding). None draws one from torch's generator.
        backend: "torch", "cpu", "triton", or None for the automatic choice.

    Returns:
        `[..., N]`, int64, without derivatives.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        BackendError: the requested backend cannot run here.
    """
    function = "sample_reference"
    given = Averaging(function, x, refs, sigma2, Weighting(log_weights, exclude_self, kernel))
    key = philox.as_seed(check_seed(function, seed), x.device, f"{function}: seed")
    tensors = (t if t is None else t.detach() for t in (given.z, given.refs, given.sigma2, given.log_weights))
    weights = given.exclude_self, given.kernel
    index = sample_reference_op(*tensors, *weights, key, pick_backend(backend, x.device))
    return given.groups.unflatten(index)
