"""The plan of the house: imports point one way, and no module or function is too long to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rooms from the ground up: a room imports from those below it and from itself; scripts and tools are the roof.
FLOORS = {"losses": 0, "models": 0, "utils": 1, "options": 2, "methods": 3, "imagesets": 4, "training": 5}
ROOF = max(FLOORS.values()) + 1
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - FLOORS.keys()
FOLDERS = ("models", "options", "methods", "imagesets", "training", "tools", "data", "docs", "scripts")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def tree_of(path):
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(), path)


def imports(tree):
    """Return the first names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor_and_is_short(path):
    room, tree = path.relative_to(ROOT).parts[0].removesuffix(".py"), tree_of(path)
    floor = FLOORS.get(room, ROOF)
    others = imports(tree) - {room}
    assert not {name for name in others if FLOORS.get(name, -1) >= floor}
    assert not others & (SCRIPTS | {"tools"}) or room in SCRIPTS
    assert len(path.read_text().splitlines()) <= 300
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 50]


def test_losses_import_torch_alone():
    assert imports(tree_of(ROOT / "losses.py")) == {"torch"}


def test_few_files_lie_at_the_root():
    assert len([*ROOT.glob("*.py")]) <= 16 and [path.name for path in ROOT.glob("*.sh")] == ["test_model.sh"]
