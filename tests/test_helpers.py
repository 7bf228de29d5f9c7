"""What tests share lives in helpers/: a test module can be read, moved and run alone."""

import ast

from helpers.models import ROOT


def imported(path):
    """Return the modules that a Python file imports, and the line of each."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found[node.module] = node.lineno
    return found


def test_no_test_module_is_imported():
    files = sorted((ROOT / "tests").rglob("*.py"))
    modules = {path.stem for path in files if path.stem.startswith("test_") or path.stem == "conftest"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}; move what they share to tests/helpers"
        for path in files
        for name, line in imported(path).items()
        if name.split(".")[-1] in modules
    ]
    assert len(files) > 30 and not found, "\n".join(found)
