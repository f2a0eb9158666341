"""Methods of other papers, each a few lines around `fluxkernels.kernel_average`."""

from fluxmatching.recipes.drifting import drifting_field
from fluxmatching.recipes.flow_matching import flow_matching_target
from fluxmatching.recipes.mean_shift import mean_shift
from fluxmatching.recipes.stable_target import stable_target_field
from fluxmatching.recipes.stein import kernel_stein_discrepancy, svgd_step

__all__ = [
    "drifting_field",
    "flow_matching_target",
    "kernel_stein_discrepancy",
    "mean_shift",
    "stable_target_field",
    "svgd_step",
]
