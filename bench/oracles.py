"""The flux loss against its closed forms, for every combination of its options, with standard errors.

python -m bench.oracles [--backend torch]
"""

import argparse
from typing import Any

import torch

import fluxkernels as fk
from tests.support import oracles, problems


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.oracles", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    with fk.use_backend(parser.parse_args().backend):
        torch.manual_seed(0)
        U = torch.randn(3, 3, dtype=problems.F64)
        truth = oracles.gaussian_flux_loss(U.numpy())
        names = ("estimator", "second_derivatives", "divergence")
        print(f"| {' | '.join(names)} | Gaussian, truth | estimate | antisymmetric U, truth 0 |")
        print("|---|---|---|---|---|---|")
        for method in problems.METHODS:
            options: dict[str, Any] = dict(zip(names, method, strict=True))
            mean, error = problems.gaussian(U, **options)
            zero, _ = problems.gaussian(U - U.T, batches=4, **options)
            print(f"| {' | '.join(method)} | {truth:.3f} | {mean:.3f} ± {error:.3f} | {zero:.0e} |")
        print("\n| estimator | divergence | s + J∇ψ/p, truth 0 | s + ∇ψ/p, truth > 0 |")
        print("|---|---|---|---|")
        for estimator in ("cross_chain", "single_chain"):
            for divergence in ("exact", "hutchinson"):
                cells = []
                for violating in (False, True):
                    mean, error = problems.mixture(
                        violating=violating, batches=256, estimator=estimator, divergence=divergence
                    )
                    cells.append(f"{mean:.2g} ± {error:.1g}")
                print(f"| {estimator} | {divergence} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
