"""Means over bins of the horizontal axis, as in Figure 4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """Means over equal-width bins of the horizontal axis; all attributes have one entry per non-empty bin."""

    x: Array
    mean: Array
    error: Array

    @property
    def rising(self) -> bool:
        """True if no mean lies below the one before by more than their combined standard errors."""
        margin = np.hypot(self.error[1:], self.error[:-1])
        return bool((np.diff(self.mean) >= -margin).all())


def bin_means(x: Array, y: Array, y_error: Array, bins: int) -> Bins:
    """Compute mean x, mean y and its standard error in each of `bins` bins between min x and max x, as in Fig. 4.

    The standard error is that of the spread of the fields. A bin of one field has no spread and takes the field's
    own `y_error`.
    """
    width = (x.max() - x.min()) / bins or 1.0
    index = np.minimum(((x - x.min()) / width).astype(int), bins - 1)
    members = [np.flatnonzero(index == b) for b in np.unique(index)]
    error = [y[m].std(ddof=1) / len(m) ** 0.5 if len(m) > 1 else y_error[m[0]] for m in members]
    return Bins(
        x=np.array([x[m].mean() for m in members]),
        mean=np.array([y[m].mean() for m in members]),
        error=np.array(error),
    )
