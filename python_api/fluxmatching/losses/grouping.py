"""Conversion between a minibatch `[N, *event]` and the points `[..., N, D]` that the ops take."""

from torch import Tensor


class Grouping:
    """Layout of a minibatch as points: `[N, *event]` as `[N, D]`, or grouped `[N, G, D]` as `[G, N, D]`.

    Args:
        function: name for error messages.
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

    def refs_to_points(self, refs: Tensor) -> Tensor:
        """Convert reference points `[M, *event]`, or grouped `[M, G or 1, D]`.

        Raises:
            ValueError: their shape does not fit x.
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
        """Raise ValueError unless value is one number, or in a grouped loss one number or one per group."""
        allowed = [[], [self.event[0]]] if self.grouped else [[]]
        if list(value.shape) not in allowed:
            takes = f"one number or one per group, shape [{self.event[0]}]" if self.grouped else "one number"
            several = self.function == "flux_matching_loss" and name == "sigma" and not self.grouped
            hint = "; NoiseAnnealedFluxMatching trains a field f(x, σ) at many" if several else ""
            raise ValueError(f"{self.function}: {name} must be {takes}, got shape {list(value.shape)}{hint}")
