"""Two masses, each tied to a wall and both to each other by nonlinear springs (Eq. 46, Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor

WALL = 1.0  # k_wall
COUPLING = 0.7  # k_couple
DAMPING = 0.08  # γ
CUBIC = 0.08  # c
POSITION, VELOCITY = 3.0, 1.5  # standard deviations of the initial state
STEP_SIZE = 0.1  # physical time between points
LENGTH = 50  # points of a trajectory


def velocity(state: Tensor) -> Tensor:
    """d/dt of (q1, v1, q2, v2), `[..., 4]`."""
    q1, v1, q2, v2 = state.unbind(-1)
    pull = COUPLING * (q1 - q2)
    a1 = -WALL * q1 - pull - DAMPING * v1 - CUBIC * q1**3
    a2 = -WALL * q2 + pull - DAMPING * v2 - CUBIC * q2**3
    return torch.stack([v1, a1, v2, a2], -1)


def trajectories(count: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """Trajectories from random initial states by the classical Runge-Kutta method, `[count, length, 4]`, float32."""
    state = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    state = state * torch.tensor([POSITION, VELOCITY, POSITION, VELOCITY], dtype=torch.float64)
    states = [state]
    for _ in range(length - 1):
        k1 = velocity(state)
        k2 = velocity(state + STEP_SIZE / 2 * k1)
        k3 = velocity(state + STEP_SIZE / 2 * k2)
        k4 = velocity(state + STEP_SIZE * k3)
        state = state + STEP_SIZE / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(state)
    return torch.stack(states, 1).float()
