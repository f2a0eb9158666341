"""How a minibatch `[N, *event]` is laid out for the ops, which take `[..., N, D]`."""

from torch import Tensor


class Layout:
    """Between a minibatch and points: `[N, *event]` and `[N, D]`, or grouped `[N, G, D]` and `[G, N, D]`.

    Args:
        x: the minibatch.
        grouped: whether its second dimension counts groups, each with a kernel density estimate of its own.

    Raises:
        ValueError: x has no event dimension, or is grouped without having three dimensions.
    """

    def __init__(self, x: Tensor, grouped: bool) -> None:
        if grouped and x.ndim != 3:
            raise ValueError(f"a grouped loss takes x of shape [N, groups, D], got {list(x.shape)}")
        if x.ndim < 2:
            raise ValueError(f"x must have shape [N, *event], got {list(x.shape)}")
        self.grouped = grouped
        self.event = x.shape[1:]

    def to_points(self, x: Tensor) -> Tensor:
        return x.movedim(0, 1) if self.grouped else x.reshape(x.shape[0], -1)

    def from_points(self, points: Tensor) -> Tensor:
        return points.movedim(0, 1) if self.grouped else points.reshape(points.shape[0], *self.event)

    def per_sample(self, x: Tensor) -> Tensor:
        """Sum over the event: `[N, *event]` to `[N]`."""
        return x.flatten(1).sum(1)
