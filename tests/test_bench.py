"""The peers of the benchmarks compute what we compute: a comparison of speeds needs equal answers."""

import torch

from bench import bench_controllable as case
from bench import bench_kde, published
from experiments.controllable.metrics import flux_losses


def ours(family: case.Family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return flux_losses(case.make_controls(), case.THETA, family, case.BATCH, case.MINIBATCHES, generator, "torch")


def test_controllable_peer_has_the_same_loss() -> None:
    torch.manual_seed(2)
    controls = case.make_controls()
    a, b = ours("violating"), case.published_losses(controls, "violating")
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * error
    assert a.mean() > 2 * error
    scale = a.abs().mean()
    assert ours("preserving").abs().max() < 1e-8 * scale
    assert case.published_losses(controls, "preserving").abs().max() < 1e-6 * scale


def test_kde_peers_have_the_same_values() -> None:
    x, refs, sigma2 = bench_kde.inputs("springs")
    for name, call in (("kde_score", published.kde_score), ("kde_log_density", published.kde_log_density)):
        torch.testing.assert_close(
            bench_kde.CALLS[name]["ours"](x, refs, sigma2, backend="torch"), call(x, refs, sigma2), rtol=1e-3, atol=1e-3
        )
