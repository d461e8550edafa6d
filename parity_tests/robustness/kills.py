"""Kill commands while they run: ``python -m parity_tests.robustness.kills --kills 200``.

Half of the kills happen at a random time, half at a call that changes a file: before it, after it, or with
half of a write on disk. The calls of an undisturbed run are listed first and used in turn: each kind of call
on each file once, the middle of writes first, before any is repeated. After the SIGKILL the target must be
the complete old one or the complete new one. Running the command again must then leave every file as an
undisturbed run does. Only hidden files, which the killed process could not remove, may be left in addition;
they are counted.

``convert``, ``export to h5``, ``eval again`` and ``download again`` begin with a complete old target.
``eval``, ``download``, ``export`` and ``release`` begin without one; the last two never replace a target. The
commands run in forks of this process, which has already loaded PyTorch, so that they spend most of their time
on work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parity_tests.robustness import moments, named
from parity_tests.robustness.kill_commands import COMMANDS, LOG, Command, fork, release_server
from parity_tests.robustness.moments import MIDDLE, Calls, Moment

ABSENT = "absent"
OLD, NEW, BROKEN, AGAIN = "old", "new", "broken target", "failed when run again"
LEFT, HIDDEN = "left a visible file", "left a hidden file"
FAULTS = (BROKEN, AGAIN, LEFT)
BY_TIME, BY_CALL = "any moment", "file calls"


# --- killing ---------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """The results after each kill. ``examples``: (verdict, seed, details) of the faults."""

    seconds: float
    moments: int
    by: dict[str, Counter[str]] = field(default_factory=lambda: {BY_TIME: Counter(), BY_CALL: Counter()})
    examples: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """The verdicts of all kills, and :data:`HIDDEN`, which is counted separately."""
        return sum(self.by.values(), Counter())

    @property
    def faults(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)


@dataclass(frozen=True)
class _Trial:
    """A command, the folder that it starts from, and the result of undisturbed runs."""

    command: Command
    start: Path
    work: Path
    old: str
    new: str
    result: dict[str, str]  # the files after an undisturbed run
    seconds: float
    moments: list[Moment]

    def attempt(self, moment: Moment | None, rng: random.Random) -> tuple[str, bool, str]:
        """Kill the command once, at ``moment`` or a random time: (verdict, hidden files left, details)."""
        _reset(self.start, self.work)
        pid = fork(self.command.run, self.work, Calls(self.work, moment) if moment else None)
        if moment is None:
            time.sleep(rng.uniform(0, 1.05 * self.seconds))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if moment and status != signal.SIGKILL:
            return AGAIN, False, f"never came {moment}: {self._log()}"
        found = digest(self.work / self.command.target)
        if found not in (self.old, self.new):
            return BROKEN, False, f"{moment or 'at a random time'}; there is {', '.join(files(self.work))}"
        if not (self.command.once and found == self.new):
            status = os.waitpid(fork(self.command.run, self.work), 0)[1]
            if status:
                return AGAIN, False, f"{moment or 'at a random time'}: {self._log()}"
        return self._judge(OLD if found == self.old else NEW, moment)

    def _judge(self, verdict: str, moment: Moment | None) -> tuple[str, bool, str]:
        now = files(self.work)
        wrong = [name for name, content in self.result.items() if now.get(name) != content]
        left = [name for name in now if name not in self.result]
        hidden = [name for name in left if any(part.startswith(".") for part in Path(name).parts)]
        if wrong:
            return AGAIN, bool(hidden), f"{moment or 'at a random time'}; differs: {', '.join(wrong)}"
        if left != hidden:
            return LEFT, bool(hidden), f"{moment or 'at a random time'}; left: {', '.join(left)}"
        return verdict, bool(hidden), ""

    def _log(self) -> str:
        return (self.work / LOG).read_text()[-500:]


def kill(command: Command, kills: int, seed: int, progress: Callable[[], None] = lambda: None) -> Tally:
    """Run ``command`` and kill it, ``kills`` times."""
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        trial = _prepared(command, Path(root))
        tally = Tally(trial.seconds, len(trial.moments))
        ordered = in_turn(trial.moments, random.Random(seed))
        for number in range(kills):
            how, moment = BY_TIME, None
            if number % 2 == 0 and ordered:
                how, moment = BY_CALL, ordered[number // 2 % len(ordered)]
            verdict, hidden, more = trial.attempt(moment, random.Random(seed + number))
            tally.by[how][verdict] += 1
            tally.by[how][HIDDEN] += hidden
            if verdict in FAULTS:
                tally.examples.append((verdict, seed + number, more))
            progress()
    return tally


def _prepared(command: Command, root: Path) -> _Trial:
    """Make three undisturbed runs, which must agree."""
    start, work, seen = root / "start", root / "work", root / "seen"
    start.mkdir()
    command.prepare(start)
    durations, results = [], []
    for _ in range(3):
        _reset(start, work)
        began = time.perf_counter()
        status = os.waitpid(fork(command.run, work, Calls(work), seen), 0)[1]
        assert status == 0, (work / LOG).read_text()[-2000:]
        durations.append(time.perf_counter() - began)
        results.append(files(work))
    assert results[0] == results[1] == results[2], f"{command.name} writes different files each time"
    old, new = digest(start / command.target), digest(work / command.target)
    assert old != new
    written, found = moments.load(seen)
    sizes = {name: _size(work / name) for name in results[0]}
    grown = sum(max(0, size - _size(start / name)) for name, size in sizes.items())
    assert written >= grown, f"{command.name} writes files by calls that are not watched"
    return _Trial(command, start, work, old, new, results[0], statistics.median(durations), found)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def in_turn(found: list[Moment], rng: random.Random) -> list[Moment]:
    """In random order, but one of each kind in turn, and middles first, so that rare writes come early."""
    kinds: dict[str, list[Moment]] = {}
    for moment in sorted(rng.sample(found, len(found)), key=lambda moment: moment.phase != MIDDLE):
        kinds.setdefault(moment.what, []).append(moment)
    rounds = itertools.zip_longest(*kinds.values())
    return [moment for each in rounds for moment in each if moment]


def _reset(start: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work)


def files(folder: Path) -> dict[str, str]:
    """Name → digest of every file and folder in ``folder``, except the log."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: digest(path) if path.is_file() else "folder" for name, path in found.items() if name != LOG}


def digest(target: Path) -> str:
    """The digest of a file, or of all files in a folder; :data:`ABSENT` if there is none."""
    if not target.exists():
        return ABSENT
    content = hashlib.sha256()
    for path in [target] if target.is_file() else sorted(target.rglob("*")):
        if path.is_file():
            content.update(f"\n{path.relative_to(target.parent)}\n".encode())
            content.update(path.read_bytes())
    return content.hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.robustness.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each command (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first kill's moment (default: 0)")
    parser.add_argument("--commands", help=f"comma-separated (default: all): {', '.join(COMMANDS)}")
    parser.add_argument("--json", action="store_true", help="print the table as JSON on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    names = named(arguments.commands, COMMANDS, "command")
    load_libraries()
    console = Console(stderr=arguments.json, highlight=False)
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as bar, release_server():
        task = bar.add_task("", total=arguments.kills * len(names))
        tallies = {}
        for name in names:
            tally = kill(COMMANDS[name], arguments.kills, arguments.seed, lambda: bar.advance(task))
            tallies[name] = tally
            console.print(f"{name}: {dict(tally.counts)}", markup=False)  # a long run may be cut short
    draw(console, tallies)
    if arguments.json:
        found = {
            name: {"seconds": tally.seconds, "moments": tally.moments, **tally.by}
            for name, tally in tallies.items()
        }
        json.dump(found, sys.stdout, indent=2)
        print()
    return 1 if any(tally.faults for tally in tallies.values()) else 0


def load_libraries() -> None:
    """Import the libraries once for all forks; the commands would spend most of their time on it."""
    import pycocotools.cocoeval
    import safetensors.torch
    import torch

    with contextlib.suppress(ImportError):
        import tensorflow

        assert tensorflow
    torch.set_num_threads(1)
    assert safetensors.torch
    assert pycocotools.cocoeval


def draw(console: Console, tallies: dict[str, Tally]) -> None:
    heads = ("command", "seconds", "killed at", "kills", "of\nmoments", "old", "new", "hidden\nfiles left")
    table = Table(*heads, "anything\nelse")
    for name, tally in tallies.items():
        for how, counts in tally.by.items():
            faults = sum(counts[fault] for fault in FAULTS)
            moments_ = tally.moments if how == BY_CALL else "-"
            numbers = (counts[OLD] + counts[NEW] + faults, moments_, counts[OLD], counts[NEW])
            table.add_row(name, f"{tally.seconds:.2f}", how, *map(str, (*numbers, counts[HIDDEN], faults)))
    console.print(table)
    for name, tally in tallies.items():
        for verdict, seed, more in tally.examples[:5]:
            console.print(f"{name}, seed {seed}: {verdict}\n{more}", markup=False, style="red")


if __name__ == "__main__":
    sys.exit(main())
