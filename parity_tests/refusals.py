"""Which refusals the tests bring about: ``pytest parity_tests --refusals`` names those that none did.

A refusal is a place in the code where an error of the family is made: the code is searched for them. Those
made while the tests run are noted, in the commands that tests start too.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("porting", "pytorch_model", "tools")
FAMILY = "PortingError"
FOLDER = "PORTING_REFUSALS"  # environment variable: the folder where processes note

#: Python runs this when it starts, where the folder that holds it is in PYTHONPATH.
_SITECUSTOMIZE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from parity_tests.refusals import note
note()
del sys.path[0]
"""


def start(folder: Path) -> None:
    """Note refusals here and in every Python process started from now on, in ``folder``."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    os.environ[FOLDER] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    note()


def note() -> None:
    """Have every error of the family note where in the code it was made."""
    from pytorch_model.errors import PortingError

    seen: set[str] = set()

    def noting(self: PortingError, *arguments: Any) -> None:
        Exception.__init__(self, *arguments)
        frame = sys._getframe(1)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if place not in seen:
            seen.add(place)
            with open(Path(os.environ[FOLDER]) / "places", "a") as file:
                file.write(place + "\n")

    PortingError.__init__ = noting  # type: ignore


def brought_about(folder: Path) -> set[tuple[Path, int]]:
    """(file, line) of all that was noted in ``folder``."""
    if not (folder / "places").exists():
        return set()
    lines = (folder / "places").read_text().splitlines()
    return {(Path(line.rpartition(":")[0]).resolve(), int(line.rpartition(":")[2])) for line in lines}


def refusals() -> Iterator[tuple[Path, int, int, str]]:
    """(file, first line, last line, source) of every place that makes an error of the family."""
    trees = {
        path: ast.parse(path.read_text()) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))
    }
    classes = [found for tree in trees.values() for found in _classes(tree)]
    family = {FAMILY}
    while more := {name for name, bases in classes if bases & family} - family:
        family |= more
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in family:
                yield path, node.lineno, node.end_lineno or node.lineno, ast.unparse(node)


def _classes(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, {_name(base) for base in node.bases}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def missing(folder: Path) -> list[str]:
    """One line for each refusal that was not brought about."""
    found = brought_about(folder)
    return [
        f"{path.relative_to(ROOT)}:{first}: {source[:150]}"
        for path, first, last, source in refusals()
        if not any((path, line) in found for line in range(first, last + 1))
    ]
