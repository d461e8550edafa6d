"""From a command's name to its exit status: ``tools/convert.py …`` and ``efficientdet-porting convert …``.

A parser is built and bad usage is answered before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from porting import __version__
from porting.cli import process

PROGRAM = "efficientdet-porting"


@dataclass(frozen=True)
class Command:
    """One command. ``module``: its name in ``arguments`` and in ``commands``. ``script``: in ``tools/``.

    ``one_thread``: run on one thread, because sums end in other digits on more, and the files must not.
    """

    name: str
    summary: str
    module: str
    script: str
    one_thread: bool = False


COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command("convert", "port a TensorFlow checkpoint to PyTorch weights", "convert", "convert.py"),
        Command(
            "verify", "prove weights layer by layer, or compare two sets of weights", "verify", "verify.py"
        ),
        Command(
            "eval",
            "COCO's figures of a weight file, next to those of a TensorFlow reference",
            "eval",
            "eval_coco.py",
        ),
        Command("detect", "detect objects in images or a video", "detect", "detect.py"),
        Command("export", "write PyTorch weights in the format of another program", "export", "export.py"),
        Command(
            "audit", "count parameters and multiply-adds, compared with the paper's", "audit", "audit.py"
        ),
        Command(
            "release",
            "put weights and their evidence into one folder that can be checked",
            "release",
            "release.py",
            one_thread=True,
        ),
        Command(
            "inspect",
            "show what a checkpoint holds, without converting it",
            "inspect",
            "inspect_checkpoint.py",
        ),
        Command("bench", "measure speed as ratios", "bench", "bench.py"),
    )
}

_THREAD_COUNTS = (
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def main() -> NoReturn:
    """The installed program: the first argument names the command."""
    process.run(lambda: _dispatch(sys.argv[1:]))


def run_command(name: str) -> NoReturn:
    """Run one command on ``sys.argv`` and exit with its status; ``tools/*.py`` call this."""
    process.run(lambda: execute(name, sys.argv[1:]))


def execute(name: str, arguments: Sequence[str], prog: str | None = None) -> int:
    """Parse ``arguments``, run the command, return its exit status.

    Raises ``SystemExit`` for ``--help`` and bad usage, and whatever the command raises.
    """
    command = COMMANDS[name]
    if command.one_thread:  # before NumPy is imported
        os.environ.update(dict.fromkeys(_THREAD_COUNTS, "1"))
    options = parse(command, arguments, prog)
    with process.imports():
        module = importlib.import_module(f"porting.cli.commands.{command.module}")
    status: int = module.run(options)
    return status


def parse(command: Command, arguments: Sequence[str], prog: str | None = None) -> Any:
    """The options of ``command``, a frozen dataclass. Raises ``SystemExit`` for ``--help`` and bad usage."""
    declared = importlib.import_module(f"porting.cli.arguments.{command.module}")
    parser = argparse.ArgumentParser(
        prog=prog, description=declared.__doc__, epilog=declared.EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    declared.add_arguments(parser)
    return declared.read_options(parser, parser.parse_args(arguments))


def _dispatch(arguments: Sequence[str]) -> int:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {command.name:<{width}}{command.summary}" for command in COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Port Google AutoML EfficientDet weights from TensorFlow to PyTorch, with proof.",
        epilog=f"commands:\n{lines}\n\n{PROGRAM} COMMAND --help explains one.\n\n{process.EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    name = parser.parse_args(arguments[:1]).command
    return execute(name, arguments[1:], f"{PROGRAM} {name}")
