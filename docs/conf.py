"""Settings of the documentation site: `make docs`."""

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python_api"), str(ROOT / "docs")]
# The pages' programs run in processes of their own, which find the packages here.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import pages  # noqa: E402

import fluxkernels  # noqa: E402

pages.write()

project, author = "fluxkernels", "the fluxkernels developers"
version = release = fluxkernels.__version__
copyright = "2026, the fluxkernels developers"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"fluxkernels {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "imported-members": True, "exclude-members": "__init__, __new__"}
# The class docstring has the arguments; that of __init__ is for readers of the source.
autoclass_content = "class"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Main", "params_style"), ("Other", "params_style"), ("Shape", "notes_style")]

# Docstrings are plain text with formulas, in which these characters mean themselves.
_MARKUP = re.compile(r"(`[^`]*`)|([|*\\]|(?<=\w)_(?!\w))")
# Code, with the characters around it next to which reStructuredText needs an escaped space.
_CODE = re.compile(r"([\w)\]]?)(`[^`]+`)(?=([\w(\[²³]?))")


def _spaced(found: re.Match[str]) -> str:
    before, code, after = found.groups()
    return (before + "\\ " if before else "") + code + ("\\ " if after else "")


def escape_formulas(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape, outside of backticks and examples, what would be markup."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            escaped = _MARKUP.sub(lambda found: found[1] or "\\" + found[2], line)
            lines[k] = _CODE.sub(_spaced, escaped)


def fit_links(app: Any, docname: str, source: list[str]) -> None:
    """Let links of the pages here, which work in the checkout too, lead to pages of the site."""
    file = Path(app.env.doc2path(docname))
    if not file.is_relative_to(pages.FOLDER):
        source[0] = pages.with_links(source[0], file, pages.sources(), file.parent)


def setup(app: Any) -> None:
    app.connect("source-read", fit_links)
    # Before napoleon, whose own markup must stay.
    app.connect("autodoc-process-docstring", escape_formulas, priority=400)
