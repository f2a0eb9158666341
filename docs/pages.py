"""Pages of the site that are Markdown files elsewhere in the checkout, with their links made to fit."""

import os
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FOLDER = DOCS / "imported"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def sources() -> dict[Path, str]:
    """Files of the checkout by the name of their page."""
    named = {
        "fluxkernels/MATH.md": "math",
        "bench/README.md": "benchmarks",
        "experiments/README.md": "experiments",
        "experiments/CLAIMS.md": "claims",
        "CONTRIBUTING.md": "contributing",
        "CHANGELOG.md": "changelog",
    }
    found = {ROOT / file: name for file, name in named.items()}
    return found | {file: f"experiment-{file.parent.name}" for file in sorted(ROOT.glob("experiments/*/README.md"))}


def with_links(text: str, file: Path, pages: dict[Path, str], folder: Path = FOLDER) -> str:
    """Point links of a file at pages of the site, as seen from `folder`; leave only the text of links to programs."""

    def fit(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        whole = Path(os.path.normpath(file.parent / path))
        page = pages.get(whole / "README.md" if whole.is_dir() else whole)
        if page is not None:
            whole = FOLDER / f"{page}.md"
        elif not image and not whole.is_relative_to(DOCS):
            return label
        return f"{image}[{label}]({os.path.relpath(whole, folder)}{'#' + anchor if anchor else ''})"

    return _LINK.sub(fit, text)


def write() -> None:
    """Write all pages anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    pages = sources()
    for file, name in pages.items():
        (FOLDER / f"{name}.md").write_text(with_links(file.read_text(encoding="utf-8"), file, pages), encoding="utf-8")
    listed = "\n".join(name for name in pages.values() if name.startswith("experiment-"))
    with (FOLDER / "experiments.md").open("a", encoding="utf-8") as page:
        page.write(f"\n```{{toctree}}\n:maxdepth: 1\n:caption: Each experiment\n\n{listed}\n```\n")
