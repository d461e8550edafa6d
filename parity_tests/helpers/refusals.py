"""Finds refusals that no test triggers: ``pytest parity_tests --refusals`` lists them.

A refusal is a place in the code that

- makes an error of the family, or a :class:`~porting.errors.Reason` for one;
- calls a function that only makes one (it never returns, or it returns an error), with its own words;
- ends the parsing of the command line with ``parser.error``.

The source is searched for refusals. While the tests run, those that are reached are recorded, also in the
commands that the tests start.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.helpers.paths import ROOT

FOLDERS = ("porting", "pytorch_model", "tools")
FAMILY = ("EfficientDetError", "Reason")
ENTRIES = ("run", "main", "run_command")  # they never return, and end a process whatever its status
FOLDER = "PORTING_REFUSALS"  # environment variable: the folder into which processes write
DEPTH = 6  # calls between a function that rejects and the function that says why

#: Python runs this when it starts, if its folder is in PYTHONPATH.
_SITECUSTOMIZE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from parity_tests.helpers.refusals import note
note()
del sys.path[0]
"""


@dataclass(frozen=True)
class Refusal:
    """A call in lines ``first`` to ``last`` of ``path``. ``calls``: the function recorded as called there."""

    path: Path
    first: int
    last: int
    calls: str
    source: str


def start(folder: Path) -> None:
    """Record refusals in ``folder``, from here and from every Python process started from now on."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    os.environ[FOLDER] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    note()


def note() -> None:
    """Make errors of the family, and parsers, record where in the code they are made, with their callers."""
    from porting.errors import EfficientDetError, Reason

    seen: set[str] = set()

    def note_callers(called: str) -> None:
        frame = sys._getframe(2)
        for _ in range(DEPTH):
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}:{called}"
            if place not in seen:
                seen.add(place)
                # A file for each process: tests limit how large a file their commands may write.
                with open(Path(os.environ[FOLDER]) / f"{os.getpid()}.places", "a") as file:
                    file.write(place + "\n")
            # An error's own __init__ counts as the error itself; any other function is called by its caller.
            called = called if frame.f_code.co_name == "__init__" else frame.f_code.co_name
            if frame.f_back is None:
                return
            frame = frame.f_back

    def noting(self: Exception, *arguments: Any) -> None:
        Exception.__init__(self, *arguments)
        note_callers("")

    error = argparse.ArgumentParser.error

    def noting_error(self: argparse.ArgumentParser, message: str) -> None:
        note_callers("error")
        error(self, message)

    EfficientDetError.__init__ = noting  # type: ignore
    Reason.__init__ = noting  # type: ignore
    argparse.ArgumentParser.error = noting_error  # type: ignore


def reached(folder: Path) -> set[tuple[str, int, str]]:
    """(file, line, function called there) of everything recorded in ``folder``."""
    lines = (line for file in folder.glob("*.places") for line in file.read_text().splitlines())
    rows = (line.rsplit(":", 2) for line in lines)
    return {(os.path.realpath(path), int(line), called) for path, line, called in rows}


def refusals() -> Iterator[Refusal]:
    """Every refusal in the source, in the order of files."""
    trees = {
        path: ast.parse(path.read_text())
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    classes = [found for tree in trees.values() for found in _classes(tree)]
    family = set(FAMILY)
    while more := {name for name, bases in classes if bases & family} - family:
        family |= more
    functions = {name for tree in trees.values() for name in _refusing(tree, family)}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = _name(node.func)
            if name in family:
                calls = ""
            elif name in functions or ast.unparse(node.func) == "parser.error":
                calls = name
            else:
                continue
            yield Refusal(path, node.lineno, node.end_lineno or node.lineno, calls, ast.unparse(node))


def _classes(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, {_name(base) for base in node.bases}


def _refusing(tree: ast.Module, family: set[str]) -> Iterator[str]:
    """Functions whose return annotation says that they make an error or never return."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            returned = _name(node.returns)
            if returned in family or (returned == "NoReturn" and node.name not in ENTRIES):
                yield node.name


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def missing(folder: Path) -> list[str]:
    """One line for each refusal that was not reached."""
    found = reached(folder)
    return [
        f"{refusal.path.relative_to(ROOT)}:{refusal.first}: {refusal.source[:150]}"
        for refusal in refusals()
        if not any(
            (str(refusal.path), line, refusal.calls) in found
            for line in range(refusal.first, refusal.last + 1)
        )
    ]
