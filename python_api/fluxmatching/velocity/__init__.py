"""RNA velocity in place of scVelo's: the fit, its model and its metrics."""

from fluxmatching.velocity.fit import flux_velocity as flux_velocity
from fluxmatching.velocity.metrics import CrossBoundaryCorrectness as CrossBoundaryCorrectness
from fluxmatching.velocity.metrics import cross_boundary_correctness as cross_boundary_correctness
from fluxmatching.velocity.metrics import velocity_consistency as velocity_consistency
from fluxmatching.velocity.model import SplicingField as SplicingField
from fluxmatching.velocity.model import splicing_loss as splicing_loss
from fluxmatching.velocity.options import VelocityOptions as VelocityOptions
