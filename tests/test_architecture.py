"""The import column of the design: each folder owns one arrow of the line, and imports only what stands before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "datamodules": set(),
    "cluster": set(),
    "metrics": {"datamodules"},
    "trainers": {"datamodules", "metrics"},
    "sweeps": {"datamodules", "metrics", "trainers", "cluster"},
    "facebench": {"datamodules", "metrics", "trainers", "sweeps", "cluster"},
}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_design(package):
    allowed = MAY_IMPORT[package] | {package}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported_packages(path) - allowed
    }
    assert not wrong


def test_pytorch_lightning_is_imported_under_one_name():
    """Ray's callbacks derive from whichever of the two packages they find first."""
    wrong = [
        path
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        if "import lightning" in path.read_text() or "from lightning" in path.read_text()
    ]
    assert not wrong
