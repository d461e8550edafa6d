"""The layout of the project: which module may import which, how large a folder is, what loads PyTorch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from parity_tests.helpers.paths import ROOT, TOOLS

FOLDERS = ("pytorch_model", "tf_reference", "porting", "tools", "parity_tests")
MOST_MODULES = 12  # in one folder, __init__.py included
COMMANDS = sorted(path.name for path in TOOLS.glob("*.py") if not path.name.startswith("_"))

#: From the lowest layer to the highest. A name stands for a module, or for a package with all its modules.
#: A module belongs to its longest matching name, and may import its own layer and those below. The packages'
#: own names are low, so that a module which is missing here fails the test as soon as it imports anything.
LAYERS: Sequence[tuple[str, ...]] = (
    ("pytorch_model", "pytorch_model.errors", "pytorch_model.files"),
    ("pytorch_model.formats",),
    ("pytorch_model.labels",),
    ("pytorch_model.config",),
    ("pytorch_model.weights",),
    (
        "pytorch_model.layers",
        "pytorch_model.efficientnet",
        "pytorch_model.bifpn",
        "pytorch_model.heads",
        "pytorch_model.anchors",
        "pytorch_model.efficientdet",
    ),
    ("pytorch_model.devices", "pytorch_model.hub"),
    ("pytorch_model.engines",),
    ("pytorch_model.detection",),
    ("pytorch_model.evaluation",),
    ("pytorch_model.training",),
    ("tf_reference",),
    ("porting", "porting.errors", "porting.scopes", "porting.transforms", "porting.synthetic"),
    ("porting.hparams",),
    ("porting.checkpoint",),
    ("porting.sources",),
    (
        "porting.rules",
        "porting.structure",
        "porting.infer",
        "porting.convert",
        "porting.reverse",
        "porting.audit",
        "porting.inspection",
    ),
    ("porting.parity",),
    ("porting.export", "porting.publish"),
    ("porting.cli.process",),
    ("porting.cli.arguments",),
    ("porting.cli.drawing",),
    ("porting.cli.commands",),
    ("porting.cli", "porting.cli.main"),
    ("tools", "hubconf"),
    ("parity_tests",),
)


class Import(NamedTuple):
    """``importer`` imports ``imported``, both of this project, in ``line`` of its file."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported}"


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name → file of every module of the project. ``__init__.py`` goes by its package's name."""
    found = {"hubconf": ROOT / "hubconf.py"}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Sequence[Import]:
    """Every import of one module of ours by another, in functions too, but not under ``TYPE_CHECKING``."""
    return [
        Import(importer, imported, node.lineno)
        for importer, path in modules().items()
        for node in _import_statements(ast.parse(path.read_text()))
        for imported in _imported(node)
        if imported != importer
    ]


def _import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from _import_statements(other)
        else:
            yield from _import_statements(node)


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of ours that a statement imports, without the packages around them."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        wanted = names
    else:
        assert node.level == 0, f"relative import in line {node.lineno}"
        module = node.module or ""
        # A name of a package is a module of it, a name that the package imports lazily, or its own.
        homes = _lazy_names(module)
        wanted = [
            inner if (inner := f"{module}.{name}") in modules() else homes.get(name, module) for name in names
        ]
    for name in dict.fromkeys(wanted):
        if name in modules():
            yield name
        elif f"tools.{name}" in modules():  # the tools' folder is on the path of the tools
            yield f"tools.{name}"


@cache
def _lazy_names(package: str) -> Mapping[str, str]:
    """Name → module for a package whose ``__init__.py`` has a table ``_HOMES`` of lazily imported names."""
    path = modules().get(package)
    for node in ast.parse(path.read_text()).body if path else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            homes = ast.literal_eval(node.value)
            return {name: f"{package}.{home}" for name, home in homes.items()}
    return {}


def _layer(module: str) -> int:
    matches = {
        name: number
        for number, names in enumerate(LAYERS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    }
    return matches[max(matches, key=len)]


def _circles(edges: Sequence[Import]) -> list[list[str]]:
    """Groups of modules that can each be reached from each other, by Tarjan's algorithm."""
    targets: dict[str, list[str]] = {}
    for edge in edges:
        targets.setdefault(edge.importer, []).append(edge.imported)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in targets.get(module, ()):
            if target not in number:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], number[target])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in targets:
        if module not in number:
            visit(module)
    return found


def test_imports_are_found() -> None:
    """The tests below would pass on an empty list."""
    assert len(modules()) > 200
    pairs = {(edge.importer, edge.imported) for edge in imports()}
    assert ("porting.convert", "porting.rules") in pairs
    assert ("porting.checkpoint.keras_h5", "porting.checkpoint.base") in pairs
    assert ("porting.convert", "pytorch_model.efficientdet") in pairs
    assert ("parity_tests.robustness.test_faults", "pytorch_model.weights.files") in pairs  # a lazy name


def test_there_is_no_circle_of_imports() -> None:
    circles = _circles(imports())
    assert not circles, "\n".join(", ".join(group) for group in circles)


def test_no_module_imports_a_higher_layer() -> None:
    upward = [edge for edge in imports() if _layer(edge.imported) > _layer(edge.importer)]
    assert not upward, "\n".join(map(str, upward))


def test_tf_reference_imports_only_the_configuration() -> None:
    """It must stay independent of what it is compared with."""
    ours = {
        edge.imported
        for edge in imports()
        if edge.importer.startswith("tf_reference") and not edge.imported.startswith("tf_reference")
    }
    assert ours == {"pytorch_model.config"}


def test_no_module_imports_a_test_file() -> None:
    wrong = [edge for edge in imports() if edge.imported.rpartition(".")[2].startswith("test_")]
    assert not wrong, "\n".join(map(str, wrong))


def test_no_folder_has_more_than_twelve_modules() -> None:
    counts: dict[str, int] = {}
    for path in modules().values():
        folder = str(path.parent.relative_to(ROOT))
        counts[folder] = counts.get(folder, 0) + 1
    assert not {folder: count for folder, count in counts.items() if count > MOST_MODULES}


def _loaded_by(code: str, *arguments: str) -> set[str]:
    """Which of PyTorch, TensorFlow and rich are loaded when ``code`` has run in a process of its own."""
    report = "print([n for n in ('rich', 'tensorflow', 'torch') if n in sys.modules], file=sys.stderr)"
    program = f"import sys, atexit\natexit.register(lambda: {report})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stderr.splitlines()[-1]))


def test_the_packages_alone_load_nothing_heavy() -> None:
    assert not _loaded_by("import porting, pytorch_model, tf_reference")
    assert "torch" in _loaded_by("from pytorch_model import Detector")  # the check sees what is loaded


@pytest.mark.parametrize("package", [name for name in modules() if _lazy_names(name)])
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == set(_lazy_names(package))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = module.absent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name: str) -> None:
    """``--help`` and bad usage are answered at once only without PyTorch and TensorFlow."""
    code = "import runpy\nsys.path.insert(0, 'tools')\nsys.argv = sys.argv[1:]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    loaded = _loaded_by(code, str(TOOLS / name), "--help")
    assert not loaded & {"torch", "tensorflow"}
