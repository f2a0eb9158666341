"""Rules of the source tree that no linter has: length of functions, and `__init__.py` files without logic."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fluxkernels", "python_api/fluxmatching", "experiments", "bench")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LONGEST = 60  # lines of code, docstring aside


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
                long[f"{path.relative_to(ROOT)}: {node.name}"] = lines_of_code(node)
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


def test_init_files_import_and_do_nothing_else() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Expr)
    logic = []
    for path in FILES:
        if path.name == "__init__.py":
            lines = [ast.unparse(node) for node in ast.parse(path.read_text()).body if not isinstance(node, allowed)]
            logic += [f"{path.relative_to(ROOT)}: {line}" for line in lines if not line.startswith("__all__ = ")]
    assert logic == []
