"""Files for people and machines around the library agree with pyproject.toml and with the code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fluxkernels import cards, doctor, environment

ROOT = Path(__file__).parents[1]
# The files are short and plain: patterns read them, so that the tests need no parser of YAML or TOML.
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
# (system, Python, PyTorch) of every job that runs the tests.
MATRIX = re.findall(r'- \{os: ([\w.-]+), python: "([\d.]+)", torch: "([\d.]+)"\}', WORKFLOWS["tests"])
OLDEST_TORCH = re.findall(r'"torch>=([\d.]+)"', PYPROJECT)


def project_list(name: str) -> list[str]:
    (listed,) = re.findall(rf"^{name} = \[(.*?)\]$", PYPROJECT, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed)


def test_python_versions_agree() -> None:
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"', PYPROJECT, flags=re.MULTILINE)
    assert [f"3.{minor}" for minor in range(int(oldest.split(".")[1]), 15)] == PYTHONS
    assert sorted({python for _, python, _ in MATRIX}, key=PYTHONS.index) == PYTHONS
    (built,) = re.findall(r'^build = "(.*)"', PYPROJECT, flags=re.MULTILINE)
    assert built.split() == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]


def test_torch_versions_agree() -> None:
    """The oldest that is allowed runs with the oldest and the newest Python, and the newest that was tested too."""
    assert [doctor.TESTED_TORCH[0]] == OLDEST_TORCH
    oldest, newest = doctor.TESTED_TORCH
    on_linux = {(python, torch) for system, python, torch in MATRIX if system.startswith("ubuntu")}
    assert on_linux >= {(PYTHONS[0], oldest), (PYTHONS[-1], oldest), (PYTHONS[-1], newest)}
    assert all(cards.release(oldest) <= cards.release(torch) <= cards.release(newest) for _, _, torch in MATRIX)
    assert {system.split("-")[0] for system, _, _ in MATRIX} == {"ubuntu", "macos", "windows"}


def test_the_torch_of_make_is_the_torch_of_the_workflows() -> None:
    (made,) = re.findall(r"^TORCH \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name in ("tests", "docs"):
        assert set(re.findall(r'make \w+ TORCH="torch==([\d.]+) ', WORKFLOWS[name])) == {made}


def test_every_job_has_a_limit_and_few_rights() -> None:
    for text in WORKFLOWS.values():
        assert "\npermissions: {}\n" in text
        assert len(re.findall(r"^    runs-on:", text, flags=re.MULTILINE)) == text.count("timeout-minutes:")
        assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_published_files_are_built_from_a_tag_only() -> None:
    publish = WORKFLOWS["wheels"].split("\n  publish:\n")[1]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish
    assert "id-token: write" in publish
    assert "password" not in publish.replace("there is no password", "")


def test_tools_of_pre_commit_are_those_of_make_check() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (pinned,) = (requirement for requirement in project_list("dev") if requirement.startswith("clang-format"))
    assert f"[{pinned}]" in config
    (oldest,) = (requirement for requirement in project_list("dev") if requirement.startswith("ruff>="))
    for version in re.findall(r"ruff==([\d.]+)", config):
        assert cards.release(version) >= cards.release(oldest.removeprefix("ruff>="))


def test_issue_forms_ask_for_the_doctor() -> None:
    for name in ("bug", "feature"):
        assert "`python -m fluxkernels`" in (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text()


def test_the_page_of_the_api_has_every_environment_variable() -> None:
    page = (ROOT / "python_api" / "README.md").read_text(encoding="utf-8")
    assert [f"| {name} | {what} |" for name, what in environment.VARIABLES.items()] == [
        line for line in page.splitlines() if line.startswith("| FLUX")
    ]


def test_the_citation_is_that_of_the_readme() -> None:
    (number,) = set(re.findall(r"arxiv\.org/abs/([\d.]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"arXiv:{number}" in citation
    for path in ("scverse/packages/fluxmatching/meta.yaml", "kernel-hub/CARD.md"):
        assert number in (ROOT / "packaging" / path).read_text(encoding="utf-8")


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_conda_recipe_has_the_requirements_of_the_package() -> None:
    recipe = (ROOT / "packaging" / "conda" / "recipe" / "recipe.yaml").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^    - ([\w-]+) (>=[\d.]+)$", recipe, flags=re.MULTILINE))
    wanted = [*project_list("dependencies"), *project_list("requires")]
    for name, bound in (re.fullmatch(r"([\w-]+)(>=[\d.]+)", text).groups() for text in wanted):  # type: ignore[union-attr]
        assert listed.pop({"torch": "pytorch"}.get(name, name)) == bound
    assert listed == {}


# What the registry's schema requires.
SCVERSE = {
    "name", "description", "project_home", "documentation_home", "install", "license", "tags", "version", "category",
    "contact",
}  # fmt: skip


def test_the_scverse_entry_has_what_the_registry_requires() -> None:
    path = ROOT / "packaging" / "scverse" / "packages" / "fluxmatching" / "meta.yaml"
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+):", text, flags=re.MULTILINE)) >= SCVERSE
    assert "pypi: fluxkernels" in text
    assert 'license = "MIT"' in PYPROJECT
    assert "license: MIT" in text


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def assemble() -> Any:
    return load(ROOT / "packaging" / "kernel-hub" / "assemble.py")


IN_A_HUB = """
import importlib.util, sys, torch
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("unique_1", folder + "/__init__.py", submodule_search_locations=[folder])
hub = sys.modules["unique_1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
assert "fluxkernels" not in sys.modules
x, refs = torch.randn(9, 3), torch.randn(11, 3)
truth = hub.kde_score(x.double(), refs.double(), 0.5, backend="torch")
for name in ("torch", *(["triton"] if hub.backends()["triton"].available else [])):
    assert (hub.kde_score(x, refs, 0.5, backend=name) - truth).norm() < 1e-6 * truth.norm()
import fluxkernels
assert (fluxkernels.kde_score(x, refs, 0.5) - truth).norm() < 1e-6 * truth.norm()
assert hasattr(torch.ops.unique_1, "kde") and hasattr(torch.ops.fluxkernels, "kde")
print(hub.backends()["cpu"].missing)
"""


def test_the_package_for_the_kernel_hub_runs_beside_this_one(assemble: Any, tmp_path: Path) -> None:
    """Under another name, with ops in another namespace, as the hub loads it."""
    assemble.assemble(tmp_path / "hub")
    package = tmp_path / "hub" / "torch-ext" / "fluxkernels"
    (package / "_ops.py").write_text('def add_op_namespace_prefix(name):\n    return f"unique_1::{name}"\n')
    done = subprocess.run([sys.executable, "-c", IN_A_HUB, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install fluxkernels" in done.stdout
    assert {path.name for path in (tmp_path / "hub").iterdir()} >= {"build.toml", "flake.nix", "CARD.md", "LICENSE"}
    with pytest.raises(SystemExit, match="OUTPUT must not exist"):
        assemble.assemble(tmp_path / "hub")


def test_an_absolute_import_is_refused(assemble: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import fluxkernels.backend as backend\n")
    monkeypatch.setattr(assemble, "SOURCE", tmp_path)
    with pytest.raises(
        ValueError, match=r"assemble: module.py must name no module absolutely, got 'import fluxkernels'"
    ):
        assemble.adapted(tmp_path / "module.py")
