"""The gradient part of f - s in the plane on a grid, and with it the exact projected Fisher divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

Field = Callable[[Tensor], Tensor]


class GridProjection:
    """Solver of ∇·(p ∇φ) = ∇·(p u) in a square, for fields u sampled at the faces of its cells.

    It minimizes Σ p |∂φ - u|² over the values of φ in the cells, a discrete form of E|∇φ - u|². The error is of second
    order in the size of a cell. Faces where p is negligible are left out.

    Args:
        log_density: log p of points `[n, 2]`, float64.
        half_width: of the square around 0; p must be negligible outside.
        cells: along each side.
    """

    def __init__(self, log_density: Field, half_width: float, cells: int) -> None:
        size = 2 * half_width / cells
        centers = (torch.arange(cells, dtype=torch.float64) + 0.5) * size - half_width
        index = torch.arange(cells * cells).reshape(cells, cells)
        middle = centers[:-1] + size / 2
        faces, pairs = [], []
        for axis, (a, b) in enumerate(((middle, centers), (centers, middle))):
            faces.append(torch.cartesian_prod(a, b))
            below = index[:-1] if axis == 0 else index[:, :-1]
            above = index[1:] if axis == 0 else index[:, 1:]
            pairs.append(torch.stack([below.flatten(), above.flatten()], 1))
        points, self.pairs = torch.cat(faces), torch.cat(pairs)
        axes = torch.arange(2).repeat_interleave(torch.tensor([len(part) for part in faces]))
        weights = log_density(points).exp() * size**2
        seen = weights > 1e-12 * weights.max()
        self.points, self.pairs, self.axes, self.weights = points[seen], self.pairs[seen], axes[seen], weights[seen]
        self.size = size
        used, self.pairs = self.pairs.unique(return_inverse=True)
        self.count = len(used)
        self._factor = splu(self._matrix())

    def _matrix(self) -> coo_matrix:
        """Return the matrix of Σ w (φ_b - φ_a)²/h²; its first cell is tied to 0, as φ is known up to a constant."""
        a, b = self.pairs.T
        w = self.weights / self.size**2
        rows, columns = torch.cat([a, b, a, b, torch.zeros(1).long()]), torch.cat([a, b, b, a, torch.zeros(1).long()])
        entries = torch.cat([w, w, -w, -w, w.max()[None]])
        return coo_matrix((entries.numpy(), (rows.numpy(), columns.numpy())), (self.count, self.count)).tocsc()

    def along_faces(self, field: Field) -> Tensor:
        """Return a field's component across each face, `[F]`; the field is evaluated in float32."""
        values = field(self.points.float()).double()
        return values.gather(1, self.axes[:, None])[:, 0]

    def gradient_part(self, across: Tensor) -> Tensor:
        """Return the component of ∇φ across each face, `[F]`, for components of u, `[F]`."""
        a, b = self.pairs.T
        flow = self.weights * across.detach() / self.size
        right = torch.zeros(self.count, dtype=torch.float64).index_add(0, b, flow).index_add(0, a, -flow)
        potential = torch.from_numpy(self._factor.solve(right.numpy()))
        return (potential[b] - potential[a]) / self.size

    def mean_product(self, one: Tensor, other: Tensor) -> Tensor:
        """Return E[a·b] of two fields given by their components across the faces, `[]`."""
        return (self.weights * one * other).sum()
