"""The springs' simulator against SciPy and its energy, the transformer against what a mask must do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from experiments.springs import simulator
from experiments.springs.network import TrajectoryTransformer
from experiments.springs.simulator import trajectories, velocity


def test_trajectories_are_those_of_scipy() -> None:
    found = trajectories(3, torch.Generator().manual_seed(1)).double()
    times = np.arange(simulator.LENGTH) * simulator.STEP
    for trajectory in found:
        exact = solve_ivp(
            lambda _, y: velocity(torch.from_numpy(y)).numpy(),
            (0, times[-1]),
            trajectory[0].numpy(),
            t_eval=times,
            rtol=1e-10,
            atol=1e-10,
        )
        # The classical method at a step of 0.1: its own error is up to 10⁻³ for the stiffest starts.
        np.testing.assert_allclose(trajectory.numpy(), exact.y.T, atol=2e-3)


def test_energy_falls_as_damping_takes_it() -> None:
    """dE/dt = -γ (v1² + v2²), whatever the springs: checks every term of the forces."""
    state = torch.randn(100, 4, dtype=torch.float64, requires_grad=True)
    q1, v1, q2, v2 = state.unbind(-1)
    springs = simulator.WALL * (q1**2 + q2**2) / 2 + simulator.COUPLING * (q1 - q2) ** 2 / 2
    energy = (v1**2 + v2**2) / 2 + springs + simulator.CUBIC * (q1**4 + q2**4) / 4
    (gradient,) = torch.autograd.grad(energy.sum(), state)
    loss = -simulator.DAMPING * (v1**2 + v2**2)
    torch.testing.assert_close((gradient * velocity(state)).sum(-1), loss)


def test_initial_states_have_table_5s_spread() -> None:
    first = trajectories(20_000, torch.Generator().manual_seed(0), length=2)[:, 0]
    torch.testing.assert_close(first.std(0), torch.tensor([3.0, 1.5, 3.0, 1.5]), rtol=0.03, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_point_sees_later_points_only_without_the_mask(causal: bool) -> None:
    torch.manual_seed(0)
    network = TrajectoryTransformer(10, width=32, blocks=2, heads=4, causal=causal)
    x = torch.randn(2, 10, 4)
    changed = x.clone()
    changed[:, 6] += 1
    noise = torch.zeros(2)
    difference = (network(changed, noise) - network(x, noise)).abs().amax((0, 2))
    assert difference[6:].min() > 1e-4
    assert (difference[:6].max() < 1e-6) == causal


def test_the_same_states_at_other_times_are_told_apart() -> None:
    torch.manual_seed(0)
    out = TrajectoryTransformer(10, width=32, blocks=1, heads=4)(torch.ones(1, 10, 4), torch.zeros(1))[0]
    assert (out[1:] - out[:-1]).norm(dim=1).min() > 1e-4


def test_size_of_the_papers_network() -> None:
    parameters = sum(p.numel() for p in TrajectoryTransformer().parameters())
    assert parameters == pytest.approx(38e6, rel=0.01)


def test_bad_width() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of 2 heads, got 20 and 8"):
        TrajectoryTransformer(width=20)
