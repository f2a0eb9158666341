"""The splicing model against autograd, its fit against a stationary truth, and what is written where."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn import functional as F

from fluxmatching import UniformHorizon
from fluxmatching.losses.second_derivatives import ClosedForm, endpoint_gradient
from fluxmatching.velocity import SplicingField, VelocityOptions, flux_velocity, splicing_loss
from tests.support.losses import target_of

anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install 'fluxkernels[rna]'")
F64 = torch.float64
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "progress": False}


def fit(adata: Any, preset: str = "paper", **settings: Any) -> Any:
    """`flux_velocity` with the fields of `VelocityOptions` as keywords."""
    given = {name: settings.pop(name) for name in ("vkey", "ukey", "xkey", "copy") if name in settings}
    return flux_velocity(adata, "per_gene", options=VelocityOptions.from_preset(preset, **settings), **given)


def field(genes: int, seed: int = 0) -> SplicingField:
    """With parameters of every sign."""
    made = SplicingField(genes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(genes, generator=generator))
    return made


def cells(count: int = 40, genes: int = 5, seed: int = 0) -> Any:
    """Switching on and off: unspliced rises first, then spliced follows."""
    generator = np.random.default_rng(seed)
    time = generator.uniform(0, 6, (count, 1))
    gamma = generator.uniform(0.3, 0.9, genes)
    unspliced = 1 - np.exp(-time) + 0 * gamma
    spliced = (1 - np.exp(-gamma * time)) / gamma
    noise = generator.normal(scale=0.02, size=(2, count, genes))
    layers = {"Mu": (unspliced + noise[0]).astype(np.float32), "Ms": (spliced + noise[1]).astype(np.float32)}
    return anndata.AnnData(np.zeros((count, genes), dtype=np.float32), layers=layers)


def counted_cells(**size: int) -> Any:
    """With abundances of at least 0, as counts have."""
    adata = cells(**size)
    for key in ("Mu", "Ms"):
        adata.layers[key] = np.abs(adata.layers[key])
    return adata


class TestSplicingField:
    def test_is_the_equation(self) -> None:
        made, x = field(1), torch.tensor([[[0.5, 2.0]]], dtype=F64)
        a, b, c = (getattr(made, name).item() for name in "abc")
        alpha = np.log1p(np.exp(a * 0.5 + b * 2.0 + c))
        beta, gamma = (np.log1p(np.exp(p.item())) for p in (made.splicing, made.degradation))
        expected = [alpha - beta * 0.5, beta * 0.5 - gamma * 2.0]
        torch.testing.assert_close(made(x).squeeze(), torch.tensor(expected, dtype=F64))

    def test_starts_as_linear_kinetics(self) -> None:
        x = torch.rand(3, 4, 2)
        half = F.softplus(torch.zeros(()))
        torch.testing.assert_close(SplicingField(4)(x)[..., 0], half - half * x[..., 0])

    @pytest.mark.parametrize("rate", [0.5, 10.0, 300.0])
    def test_circulates_about_the_mean(self, rate: float) -> None:
        made, means = SplicingField(3).double(), torch.tensor([[0.2, 1.0], [3.0, 2.0], [1e-3, 5.0]], dtype=F64)
        made.circulate(means, rate)
        torch.testing.assert_close((made.beta * made.gamma).sqrt(), torch.full((3,), rate, dtype=F64))
        unspliced, spliced = means.unbind(-1)
        torch.testing.assert_close(made.beta * unspliced, made.gamma * spliced)
        # α is a softplus, so it is c = β ū at the mean to within log(1 + e^-c).
        velocity, excess = made(means[None])[0], torch.log1p(torch.exp(-made.c))
        torch.testing.assert_close(velocity, torch.stack([excess, torch.zeros(3, dtype=F64)], -1), atol=1e-9, rtol=1e-9)
        divergence = made.a - made.beta - made.gamma
        assert (divergence < 0).all()
        assert (divergence > -0.051 * (made.beta + made.gamma)).all()
        # Above the line u/s = ū/s̄ there is transcription, below it hardly any.
        above, below = means * torch.tensor([3.0, 1.0]), means * torch.tensor([1.0, 3.0])
        assert (made.transcription(above[None]) > made.transcription(below[None])).all()

    @pytest.mark.parametrize("probing", [False, True])
    def test_its_endpoint_gradient_is_autograds(self, probing: bool) -> None:
        made = field(6)
        assert isinstance(made, ClosedForm)
        z, score, probe = torch.randn(3, 9, 6, 2, dtype=F64)
        found = [
            endpoint_gradient(made, z, score, probe.sign() if probing else None, method=method, grouped=True)
            for method in ("closed_form", "double_backward")
        ]
        for closed, exact in zip(*found, strict=True):
            torch.testing.assert_close(closed, exact.detach(), rtol=1e-12, atol=1e-12)

    def test_the_loss_is_that_of_every_gene_scaled_and_summed(self, backend: str) -> None:
        made, x, sigma = field(3), torch.rand(12, 3, 2, dtype=F64), 0.5
        found = splicing_loss(made, x, sigma, seed=5, backend=backend)
        options: dict[str, Any] = {"grouped": True, "second_derivatives": "double_backward", "divergence": "exact"}
        by_gene = target_of(made, x, sigma, seed=5, horizon=UniformHorizon(), **options).terms(made)
        torch.testing.assert_close(found, 0.0625 * by_gene.reshape(12, -1).sum(1))

    def test_the_loss_uses_it(self, backend: str) -> None:
        made, x = field(3), torch.rand(12, 3, 2, dtype=F64)
        options: dict[str, Any] = {"grouped": True, "divergence": "exact", "seed": 1}
        closed = target_of(made, x, 0.1, second_derivatives="closed_form", **options).target
        exact = target_of(made, x, 0.1, second_derivatives="double_backward", **options).target
        torch.testing.assert_close(closed, exact)


class TestFluxVelocity:
    def test_writes_scvelos_names_and_nothing_else(self) -> None:
        adata = cells()
        before = {key: value.copy() for key, value in adata.layers.items()}
        assert fit(adata, **QUICK) is None
        assert set(adata.layers) == {"Mu", "Ms", "velocity", "velocity_u", "velocity_alpha"}
        names = {f"velocity_{name}" for name in ("a", "b", "c", "beta", "gamma", "scale", "genes")}
        assert set(adata.var) == names
        assert set(adata.uns) == {"velocity_params"}
        assert adata.uns["velocity_params"]["mode"] == "flux"
        for key, value in before.items():
            np.testing.assert_array_equal(adata.layers[key], value)

    def test_velocities_follow_from_the_rates(self) -> None:
        adata = cells()
        fit(adata, vkey="v", **QUICK)
        u, s = adata.layers["Mu"], adata.layers["Ms"]
        a, b, c, beta, gamma = (adata.var[f"v_{name}"].to_numpy() for name in ("a", "b", "c", "beta", "gamma"))
        alpha = np.log1p(np.exp(a * u + b * s + c))
        np.testing.assert_allclose(adata.layers["v_alpha"], alpha, rtol=1e-5)
        np.testing.assert_allclose(adata.layers["v_u"], alpha - beta * u, atol=1e-5)
        np.testing.assert_allclose(adata.layers["v"], beta * u - gamma * s, atol=1e-5)

    def test_the_same_seed_gives_the_same_answer(self) -> None:
        first, second, third = (fit(cells(), seed=seed, copy=True, **QUICK).layers["velocity"] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, third)

    def test_a_copy_leaves_the_original_alone(self) -> None:
        adata = cells()
        copied = fit(adata, copy=True, **QUICK)
        assert "velocity" in copied.layers
        assert set(adata.layers) == {"Mu", "Ms"}
        assert not len(adata.uns)

    def test_no_epochs_writes_the_start(self) -> None:
        adata = cells()
        fit(adata, epochs=0)
        half = np.log(2, dtype=np.float32)
        np.testing.assert_allclose(adata.var["velocity_beta"], half)
        np.testing.assert_allclose(
            adata.layers["velocity"], half * (adata.layers["Mu"] - adata.layers["Ms"]), atol=1e-6
        )

    def test_scaled_genes_have_no_unit(self) -> None:
        first, second = counted_cells(), counted_cells()
        units = np.array([1e-4, 1e-2, 1.0, 64.0, 4096.0], dtype=np.float32)
        for key in ("Mu", "Ms"):
            second.layers[key] *= units
        for adata in (first, second):
            fit(adata, preset="circulating", **QUICK | {"iterations": 4})
        for layer in ("velocity", "velocity_u", "velocity_alpha"):
            scale = np.abs(first.layers[layer]).max()
            np.testing.assert_allclose(second.layers[layer] / units, first.layers[layer], atol=1e-4 * scale)
        for name in ("beta", "gamma"):
            np.testing.assert_allclose(second.var[f"velocity_{name}"], first.var[f"velocity_{name}"], rtol=1e-4)
        np.testing.assert_allclose(second.var["velocity_scale"] / units, first.var["velocity_scale"], rtol=1e-5)

    def test_scaled_velocities_follow_from_the_rates(self) -> None:
        adata = counted_cells()
        fit(adata, preset="circulating", **QUICK | {"iterations": 4})
        u, s = adata.layers["Mu"], adata.layers["Ms"]
        a, b, c, beta, gamma, k = (
            adata.var[f"velocity_{n}"].to_numpy() for n in ("a", "b", "c", "beta", "gamma", "scale")
        )
        np.testing.assert_allclose(k, s.std(0), rtol=1e-5)
        alpha = k * np.logaddexp(0, (a * u + b * s) / k + c)
        np.testing.assert_allclose(adata.layers["velocity_alpha"], alpha, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(adata.layers["velocity_u"], alpha - beta * u, atol=1e-3)
        np.testing.assert_allclose(adata.layers["velocity"], beta * u - gamma * s, atol=1e-4)

    def test_training_mends_a_circulating_start(self) -> None:
        """Genes switched off so late that no cell is seen to decay: γ/β = ū/s̄ is wrong, and the fit finds better."""
        generator = np.random.default_rng(0)
        genes, time = 10, generator.uniform(0, 25, (600, 1))
        beta, gamma = np.exp(generator.normal(-0.7, 0.3, genes)), np.exp(generator.normal(-1.2, 0.3, genes))
        switch = generator.uniform(16, 24, genes)

        def risen(time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            by_splicing, by_degradation = np.exp(-beta * time), np.exp(-gamma * time)
            return (1 - by_splicing) / beta, (1 - by_degradation) / gamma + (by_degradation - by_splicing) / (
                gamma - beta
            )

        # The equations are linear: what is switched off falls as a second rise would have risen.
        u, s = (rise - fall for rise, fall in zip(risen(time), risen(np.maximum(time - switch, 0)), strict=True))
        layers = {
            key: (x + 0.02 * x.max(0) * generator.normal(size=x.shape)).clip(0) for key, x in (("Mu", u), ("Ms", s))
        }
        truth = beta * u - gamma * s
        cosine, error = {}, {}
        for iterations in (0, 200):
            adata = anndata.AnnData(np.zeros((600, genes), np.float32), layers=layers)
            fit(adata, preset="circulating", progress=False, iterations=iterations)
            found = adata.layers["velocity"]
            cosine[iterations] = (
                (truth * found).sum(0) / np.linalg.norm(truth, axis=0) / np.linalg.norm(found, axis=0)
            ).mean()
            ratio = adata.var["velocity_gamma"] / adata.var["velocity_beta"]
            error[iterations] = np.abs(np.log(ratio / (gamma / beta))).median()
        assert cosine[0] < 0.95 < cosine[200]
        assert error[200] < error[0] / 2

    def test_iterations_in_place_of_epochs(self) -> None:
        # Two epochs of 40 cells by 16 are four minibatches.
        first, second = cells(), cells()
        fit(first, **QUICK)
        fit(second, **QUICK | {"iterations": 4, "epochs": 7})
        np.testing.assert_array_equal(first.layers["velocity"], second.layers["velocity"])

    def test_its_arguments_are_kept_and_can_be_given_again(self, tmp_path: Path) -> None:
        adata = counted_cells()
        fit(adata, preset="circulating", **QUICK | {"iterations": np.int64(2)})
        adata.write_h5ad(tmp_path / "cells.h5ad")
        again = anndata.read_h5ad(tmp_path / "cells.h5ad")
        kept = dict(again.uns["velocity_params"])
        assert (kept.pop("mode"), kept.pop("method")) == ("flux", "per_gene")
        first = again.layers["velocity"].copy()
        fit(again, progress=False, **{k: v.item() if hasattr(v, "item") else v for k, v in kept.items()})
        np.testing.assert_array_equal(again.layers["velocity"], first)
        fit(again, **QUICK)
        assert "circulation" not in again.uns["velocity_params"]

    @pytest.mark.parametrize(("count", "genes"), [(2, 5), (40, 1)])
    def test_few_cells_or_genes(self, count: int, genes: int) -> None:
        adata = cells(count=count, genes=genes)
        fit(adata, **QUICK)
        assert np.isfinite(adata.layers["velocity"]).all()

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_leaves_the_object_unchanged(
        self, interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = 0

        def loss(*_: Any, **__: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise interruption
            return splicing_loss(*_, **__)

        monkeypatch.setattr("fluxmatching.velocity.per_gene.splicing_loss", loss)
        adata = cells()[:30]
        with pytest.raises(interruption):
            fit(adata, **QUICK | {"epochs": 5})
        assert adata.is_view
        assert set(adata.layers) == {"Mu", "Ms"}
        assert not len(adata.uns)
        assert not len(adata.var.columns)

    def test_data_on_disk(self, tmp_path: Path) -> None:
        cells().write_h5ad(tmp_path / "cells.h5ad")
        backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        with pytest.raises(ValueError, match=r"a copy or a view of data on disk.*to_memory"):
            fit(backed, copy=True, **QUICK)
        fit(backed, **QUICK)
        expected = fit(cells(), copy=True, **QUICK)
        np.testing.assert_array_equal(backed.layers["velocity"], expected.layers["velocity"])

    @pytest.mark.parametrize("kind", ["csr", "csc", "csr array", "csc array", "integer", "view", "float64"])
    def test_any_kind_of_layer(self, kind: str) -> None:
        adata = cells()
        for key in ("Mu", "Ms"):
            adata.layers[key] = np.round(10 * adata.layers[key])
        expected = fit(adata, copy=True, **QUICK).layers["velocity"]
        if kind == "view":
            adata = anndata.concat([adata, adata], index_unique="-")[: adata.n_obs]
        else:
            convert: dict[str, Any] = {
                "csr": sparse.csr_matrix, "csc": sparse.csc_matrix,
                "csr array": sparse.csr_array, "csc array": sparse.csc_array,
                "integer": lambda layer: layer.astype(int), "float64": lambda layer: layer.astype(float),
            }  # fmt: skip
            for key in ("Mu", "Ms"):
                adata.layers[key] = convert[kind](adata.layers[key])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of anndata, that a view becomes a copy
            fit(adata, **QUICK)
        np.testing.assert_array_equal(adata.layers["velocity"], expected)

    def test_genes_that_cannot_be_fitted_are_left_out(self) -> None:
        adata, whole = cells(genes=5), cells(genes=5)
        adata.layers["Mu"][:, 1] = 0.3
        adata.layers["Ms"][7, 3] = np.nan
        with pytest.warns(UserWarning, match="2 of 5 genes are constant or not finite"):
            fit(adata, **QUICK)
        assert adata.var["velocity_genes"].tolist() == [True, False, True, False, True]
        assert np.isnan(adata.layers["velocity"]).all(0).tolist() == [False, True, False, True, False]
        assert np.isnan(adata.var["velocity_gamma"]).tolist() == [False, True, False, True, False]
        fine = fit(whole[:, [0, 2, 4]], copy=True, **QUICK)
        np.testing.assert_array_equal(adata.layers["velocity"][:, [0, 2, 4]], fine.layers["velocity"])

    @pytest.mark.parametrize("value", [np.inf, -np.inf, 1e12, 1e30])
    @pytest.mark.parametrize("preset", ["paper", "circulating"])
    def test_one_impossible_value_spoils_one_gene(self, value: float, preset: str) -> None:
        adata = counted_cells()
        adata.layers["Mu"][7, 3] = value
        with pytest.warns(
            UserWarning, match="1 of 5 genes are constant or not finite in a layer, or vary by more than"
        ):
            fit(adata, preset, **QUICK)
        assert adata.var["velocity_genes"].tolist() == [True, True, True, False, True]
        assert np.isfinite(adata.layers["velocity"][:, :3]).all()

    def test_fewer_cells_than_a_minibatch(self) -> None:
        first, second = cells(count=10), cells(count=10)
        fit(first, epochs=2, progress=False)
        fit(second, epochs=2, batch_size=10, progress=False)
        np.testing.assert_array_equal(first.layers["velocity"], second.layers["velocity"])
        assert np.isfinite(first.layers["velocity"]).all()

    @pytest.mark.parametrize(
        ("change", "options", "error", "message"),
        [
            (lambda a: a.layers.pop("Mu"), {}, KeyError, r"no 'Mu' \(it has \['Ms'\]\); fluxmatching.velocity.moments"),
            (lambda a: a, {"xkey": "M"}, KeyError, "no 'M'"),
            (lambda a: a.layers["Ms"].fill(1), {}, ValueError, "no gene varies in both layers with finite values"),
            (lambda a: a, {"epochs": -1}, ValueError, "epochs must be a whole number, at least 0, got -1"),
            (lambda a: a, {"sigma": -1.0}, ValueError, "sigma must be"),
            (lambda a: a, {"circulation": 0.0}, ValueError, "circulation must be a positive number, got 0.0"),
            (
                lambda a: a,
                {"circulation": 10.0},
                ValueError,
                r"with circulation abundances must be at least 0, got -0\.",
            ),
            (lambda a: a, {"lr": 0.0}, ValueError, "lr must be a positive number, got 0.0"),
            (lambda a: a, {"epochs": 1.5}, TypeError, "flux_velocity: epochs must be a whole number, got 1.5"),
            (lambda a: a, {"epochs": True}, ValueError, "epochs must be a whole number, at least 0, got True"),
            (lambda a: a, {"iterations": "10"}, TypeError, "iterations must be a whole number, got '10'"),
            (lambda a: a, {"batch_size": 1}, ValueError, "batch_size must be a whole number, at least 2, got 1"),
            (lambda a: a, {"scale": "no"}, TypeError, "scale must be True or False, got 'no'"),
            (lambda a: a, {"copy": 1}, TypeError, "copy must be True or False, got 1"),
            (lambda a: a, {"seed": 2**70}, ValueError, "seed must lie in"),
            (lambda a: a, {"seed": -1}, ValueError, r"seed must be a whole number in \[0, 2\^63\), got -1"),
            (lambda a: a, {"vkey": "Ms"}, ValueError, "vkey 'Ms' would overwrite the layer 'Ms'"),
            (lambda a: a, {"vkey": ""}, TypeError, "vkey must be a non-empty string, got ''"),
            (lambda a: a, {"vkey": None}, TypeError, "vkey must be a non-empty string, got None"),
            (lambda a: a.layers.update(v_u=a.layers["Mu"]), {"vkey": "v", "ukey": "v_u"}, ValueError, "layer 'v_u'"),
            (lambda a: a, {"backend": "gpu"}, ValueError, "backend"),
        ],
    )
    def test_errors_leave_the_object_unchanged(
        self, change: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        adata = cells()
        change(adata)
        before = {key: layer.copy() for key, layer in adata.layers.items()}
        with pytest.raises(error, match=message):
            fit(adata, **QUICK | options)
        assert set(adata.layers) == set(before)
        for key, layer in before.items():
            np.testing.assert_array_equal(adata.layers[key], layer)
        assert not len(adata.uns)
        assert not len(adata.var.columns)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self) -> None:
        with pytest.raises(ValueError, match="device 'cuda': PyTorch finds no GPU here"):
            fit(cells(), device="cuda", **QUICK)

    def test_one_cell(self) -> None:
        with pytest.raises(ValueError, match="at least two cells, got 1"):
            fit(cells(count=1))
