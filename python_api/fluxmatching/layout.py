"""How a minibatch `[N, *event]` is laid out for the ops, which take `[..., N, D]`."""

from torch import Tensor


class Layout:
    """Between a minibatch and points: `[N, *event]` and `[N, D]`, or grouped `[N, G, D]` and `[G, N, D]`.

    Args:
        function: whose argument x is, for error messages.
        x: the minibatch.
        grouped: whether its second dimension counts groups, each with a kernel density estimate of its own.

    Raises:
        ValueError: x has no event dimension, or is grouped without having three dimensions.
    """

    def __init__(self, function: str, x: Tensor, grouped: bool) -> None:
        if grouped and x.ndim != 3:
            raise ValueError(f"{function}: a grouped loss takes x of shape [N, groups, D], got {list(x.shape)}")
        if x.ndim < 2:
            raise ValueError(f"{function}: x must have shape [N, *event], got {list(x.shape)}")
        self.function = function
        self.grouped = grouped
        self.event = x.shape[1:]

    def to_points(self, x: Tensor) -> Tensor:
        return x.movedim(0, 1) if self.grouped else x.flatten(1)

    def from_points(self, points: Tensor) -> Tensor:
        return points.movedim(0, 1) if self.grouped else points.reshape(points.shape[0], *self.event)

    def centres(self, refs: Tensor) -> Tensor:
        """refs `[M, *event]`, or grouped `[M, G or 1, D]`, as points.

        Raises:
            ValueError: they do not fit x.
        """
        if self.grouped:
            groups, dimensions = self.event
            if refs.ndim != 3 or refs.shape[1] not in (1, groups) or refs.shape[2] != dimensions:
                raise ValueError(
                    f"{self.function}: refs of a grouped loss must have shape [M, {groups} or 1, {dimensions}], "
                    f"got {list(refs.shape)}"
                )
        elif refs.shape[1:] != self.event:
            raise ValueError(
                f"{self.function}: refs must have shape [M, *event] with the event of x, {list(self.event)}, "
                f"got {list(refs.shape)}"
            )
        return self.to_points(refs) if self.grouped else refs.reshape(refs.shape[0], -1)

    def check_number(self, name: str, value: Tensor) -> None:
        """One number, or in a grouped loss one a group.

        Raises:
            ValueError: it is neither.
        """
        allowed = [[], [self.event[0]]] if self.grouped else [[]]
        if list(value.shape) not in allowed:
            takes = f"one number or one a group, shape [{self.event[0]}]" if self.grouped else "one number"
            raise ValueError(f"{self.function}: {name} must be {takes}, got shape {list(value.shape)}")
