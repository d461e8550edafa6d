"""Time sides in turn, and what is said of their times."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import porting

Name = TypeVar("Name", bound=Hashable)

IMPORT_TORCH = "import torch"

#: The folder to import this project from, for code that runs in a process of its own.
PACKAGES = Path(porting.__file__).parents[1]


def in_turn(
    sides: Mapping[Name, Callable[[], float]],
    repeat: int,
    warm_up: int = 0,
    after_each: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """``repeat`` times of each side. The sides run in turn, so that a busy moment affects all of them.

    Each side is a function that runs once and returns its seconds. The first ``warm_up`` rounds are not kept.
    ``after_each`` is called after every run.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + repeat):
        for name, run in sides.items():
            took = run()
            if number >= warm_up:
                seconds[name].append(took)
            after_each()
    return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """``run`` as a function that returns the seconds it took."""

    def side() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return side


def python(*arguments: str) -> Callable[[], float]:
    """A process of Python with these arguments, from its start to its end."""
    command = [sys.executable, *arguments]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True))


def command(name: str, *arguments: object, absent: Sequence[str] = ()) -> tuple[str, str]:
    """Python's arguments that run a command where the packages ``absent`` cannot be imported."""
    return "-c", (
        f"import sys; sys.modules.update(dict.fromkeys({list(absent)})); "
        f"sys.argv = {[name, *map(str, arguments)]}; sys.path.insert(0, {str(PACKAGES)!r}); "
        f"from porting.cli.main import run_command; run_command({name!r})"
    )


def best_and_median(seconds: Sequence[float]) -> dict[str, float]:
    return {"best": min(seconds), "median": statistics.median(seconds)}


def summarise(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """``seconds``: side → best and median. ``ratio``: side → its median over that of the side ``base``."""
    found = {name: best_and_median(values) for name, values in seconds.items()}
    return {
        "seconds": found,
        "ratio": {name: values["median"] / found[base]["median"] for name, values in found.items()},
    }
