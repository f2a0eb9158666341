"""The built wheel holds both packages and runs, without the checkout; an editable install finds both as well."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTS = "import fluxkernels, fluxmatching; print(fluxkernels.__file__, fluxmatching.__file__)"


def command(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in isolation as `pip install .` does it, from a copy: what lies in the checkout's build/ is not ours."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


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
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path
    )
    where = command(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(site))
    assert where.split() == [str(site / p / "__init__.py") for p in ("fluxkernels", "fluxmatching")]
    assert "pure PyTorch" in command(sys.executable, "-m", "fluxkernels", cwd=tmp_path, PYTHONPATH=str(site))


def test_editable_install_finds_both_from_anywhere(tmp_path: Path) -> None:
    """The install that runs these tests, seen from another folder."""
    where = command(sys.executable, "-c", IMPORTS, cwd=tmp_path).split()
    assert [Path(w).name for w in where] == ["__init__.py", "__init__.py"]


def test_importing_needs_no_experiment_dependency(tmp_path: Path) -> None:
    """The library itself asks for torch and numpy alone."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'scipy', 'tyro', 'tqdm', 'markdown']))"
    command(sys.executable, "-c", f"{blocked}; {IMPORTS}", cwd=tmp_path)
