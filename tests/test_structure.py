"""What may import what: no circles, and the demo world is a guest."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "helpers").rglob("*.py")
}


def imports(path):
    """The modules of `helpers` that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_no_file_imports_itself_in_a_circle():
    order = list(TopologicalSorter({n: imports(p) for n, p in MODULES.items()}).static_order())
    assert order.index("helpers.checks") < order.index("helpers.hooks")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_demo_world_is_a_guest(name):
    room = name.split(".")[1] if name.count(".") > 1 else ""
    if room not in ("demo", "run"):
        assert not [m for m in imports(MODULES[name]) if m.startswith("helpers.demo")]
    if room == "demo":
        assert not [m for m in imports(MODULES[name]) if m.startswith("helpers.run")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_holds_one_idea_in_at_most_300_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 300
