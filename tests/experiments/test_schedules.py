"""Schedules of the learning rate."""

import pytest

from experiments.common.schedules import cosine_decay


def test_cosine_decay_by_hand() -> None:
    factor = cosine_decay(6)
    assert [factor(k) for k in (0, 2, 3, 4, 6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
