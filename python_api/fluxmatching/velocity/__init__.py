"""RNA velocity in place of scVelo's: the fits, their models and their metrics."""

from fluxmatching.velocity.control import control_with_permuted_unspliced as control_with_permuted_unspliced
from fluxmatching.velocity.control import control_without_unspliced as control_without_unspliced
from fluxmatching.velocity.evidence import VelocityEvidence as VelocityEvidence
from fluxmatching.velocity.evidence import velocity_evidence as velocity_evidence
from fluxmatching.velocity.fit import flux_velocity as flux_velocity
from fluxmatching.velocity.metrics import CrossBoundaryCorrectness as CrossBoundaryCorrectness
from fluxmatching.velocity.metrics import cross_boundary_correctness as cross_boundary_correctness
from fluxmatching.velocity.metrics import velocity_consistency as velocity_consistency
from fluxmatching.velocity.model import SplicingField as SplicingField
from fluxmatching.velocity.model import splicing_loss as splicing_loss
from fluxmatching.velocity.moments import moments as moments
from fluxmatching.velocity.options import SharedFlowOptions as SharedFlowOptions
from fluxmatching.velocity.options import VelocityOptions as VelocityOptions
from fluxmatching.velocity.shared_flow import SharedFlow as SharedFlow
from fluxmatching.velocity.shared_flow import fit_shared_flow as fit_shared_flow
