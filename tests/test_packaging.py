"""The built wheel holds both packages and runs, without the checkout; an editable install finds both as well."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.errors import CompileError

ROOT = Path(__file__).parents[1]
IMPORTS = "import fluxkernels, fluxmatching; print(fluxkernels.__file__, fluxmatching.__file__)"


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def command(*arguments: str, cwd: Path, **environment: str) -> str:
    done = run(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the repository: modules that were compiled in place, and build/, are not."""
    folder = tmp_path_factory.mktemp("source") / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    """Built in isolation as `pip install .` does it, in a checkout where others were built before."""
    done = pip("wheel", "--quiet", "--no-deps", "-w", str(folder), str(source), cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), FLUXKERNELS_CPU="require")


def test_wheel_contains_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"fluxkernels", "fluxmatching"}
    for package, source in (
        ("fluxkernels", ROOT / "fluxkernels"),
        ("fluxmatching", ROOT / "python_api" / "fluxmatching"),
    ):
        modules = {f"{package}/{p.relative_to(source)}" for p in source.rglob("*.py")}
        assert modules <= set(names)
        assert f"{package}/py.typed" in names
    assert "fluxkernels/MATH.md" in names
    models = ROOT / "python_api" / "fluxmatching" / "example_models"
    assert {f"fluxmatching/example_models/{p.relative_to(models)}" for p in models.glob("*/*")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def installed(wheel: Path, folder: Path) -> Path:
    done = pip("install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


# The editable install that runs these tests would provide its compiled module to a package that has none.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']"


def python(site: Path, code: str) -> str:
    """Output of `code` where `site` is all that is installed of this project."""
    return command(sys.executable, "-W", "error", "-c", f"{ALONE}\n{code}", cwd=site.parent, PYTHONPATH=str(site))


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = installed(wheel, tmp_path)
    assert python(site, IMPORTS).split() == [str(site / p / "__init__.py") for p in ("fluxkernels", "fluxmatching")]
    assert "pure PyTorch" in command(sys.executable, "-m", "fluxkernels", cwd=tmp_path, PYTHONPATH=str(site))


def test_wheel_has_the_compiled_kernels(wheel: Path, tmp_path: Path) -> None:
    """They are in it, nothing of their sources is, and the ops run on them without a word."""
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.startswith("fluxkernels/cpu/_kernels.") and ".so" in name]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    code = """
import torch, fluxkernels as fk
from fluxkernels.cpu import _kernels
print(_kernels.__file__)
x = torch.randn(50, 3)
assert fk.resolve_backend(None, "cpu") == "cpu"
torch.testing.assert_close(fk.kde_score(x, x, 0.5), fk.kde_score(x, x, 0.5, backend="torch"))
"""
    site = installed(wheel, tmp_path)
    assert python(site, code).startswith(str(site / "fluxkernels" / "cpu" / "_kernels."))


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


@pytest.mark.parametrize("environment", [{"FLUXKERNELS_CPU": "0"}, NO_COMPILER], ids=["left out", "no compiler"])
def test_without_the_compiled_kernels(source: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """It installs, reports why, and runs on PyTorch with one warning in all."""
    path = build_wheel(source, tmp_path, **environment)
    assert not [name for name in zipfile.ZipFile(path).namelist() if ".so" in name]
    code = """
import warnings
import torch, fluxkernels as fk, fluxmatching
row = fk.backends()["cpu"]
assert not row.available
assert "was not compiled when fluxkernels was installed" in row.missing, row.missing
x = torch.randn(50, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = fk.kde_score(x, x, 0.5)
    second = fluxmatching.flux_matching_loss(lambda z: -z, x, 0.5)
assert len(caught) == 1, caught
assert "slower 'torch' backend" in str(caught[0].message)
assert row.missing in str(caught[0].message)
assert torch.equal(first, fk.kde_score(x, x, 0.5, backend="torch"))
try:
    fk.kde_score(x, x, 0.5, backend="cpu")
except fk.BackendError as error:
    print(error)
"""
    assert "backend 'cpu' was asked for but cannot run: its C++ was not compiled" in python(
        installed(path, tmp_path), code
    )


def test_compiled_kernels_can_be_required(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "build", ignore_errors=True)
    arguments = ("wheel", "--no-deps", "-w", str(tmp_path), str(source))
    done = pip(*arguments, cwd=tmp_path, FLUXKERNELS_CPU="require", **NO_COMPILER)
    assert done.returncode != 0
    assert "/nonexistent/c" in done.stdout + done.stderr  # the compiler's message is shown
    assert not list(tmp_path.glob("*.whl"))


def test_msvc_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an error after which setuptools goes on without the module, as it does when a compiler is missing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    script = runpy.run_path("setup.py")
    command = script["BuildKernels"](setuptools.Distribution())
    command.compiler = SimpleNamespace(compiler_type="msvc")
    with pytest.raises(CompileError, match=r"csrc/ needs GCC or Clang: MSVC has no vector types"):
        command.build_extension(setuptools.Extension("fluxkernels.cpu._kernels", []))


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_version_is_that_of_the_tag(source: Path, tmp_path: Path) -> None:
    tagged = tmp_path / "tagged"
    # Files of earlier builds would change after the commit.
    shutil.copytree(source, tagged, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    for arguments in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "all"), ("tag", "v7.8.9")):
        command(*git, *arguments, cwd=tagged)
    path = build_wheel(tagged, tmp_path, FLUXKERNELS_CPU="0")
    assert path.name.startswith("fluxkernels-7.8.9-py3-none-any")


def test_unknown_setting_is_refused(source: Path) -> None:
    """Refused by setup.py itself, before anything is built: no need of pip, nor of setuptools' version."""
    done = run(sys.executable, "setup.py", "--version", cwd=source, FLUXKERNELS_CPU="yes")
    assert done.returncode != 0
    assert "FLUXKERNELS_CPU must be unset, 'require' or '0', got 'yes'" in done.stderr


def test_editable_install_finds_both_from_anywhere(tmp_path: Path) -> None:
    """The install that runs these tests, seen from another folder."""
    where = command(sys.executable, "-c", IMPORTS, cwd=tmp_path).split()
    assert [Path(w).name for w in where] == ["__init__.py", "__init__.py"]


def test_importing_needs_no_experiment_dependency(tmp_path: Path) -> None:
    """The library itself requires torch, numpy and tqdm alone."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['diffusers', 'markdown', 'matplotlib', 'scipy', 'tyro']))"
    command(sys.executable, "-c", f"{blocked}; {IMPORTS}", cwd=tmp_path)
