"""Feed damaged files to every reader: ``python -m parity_tests.robustness.fuzz --inputs 10000``.

Each input must be rejected with the project's own error, or give exactly the result of the sound file.
Formats without checksums (a digit in a YAML file, a pixel) may also give a different valid result, which is
counted separately. Anything else is a fault: another exception, a different result although the format has
checksums, too much time, more memory than twice the file, a dead process. For an image, twice the
pixels in the network's input are allowed if that is more, because formats compress.

Time is the processor time of the reading process, because other processes do not change it much. The limit is
ten seconds on a machine that runs :func:`pace` in :data:`PACE` seconds, and more on a slower one.

Memory is measured twice. The memory from Python's own allocators (tracemalloc) is exact. The peak of the
process's resident memory also counts PyTorch, Pillow, HDF5 and zlib, but only the pages that they touch. It
comes from Linux's /proc; on other systems it is not measured, and the summary says so. Both limits have a
constant part (OBJECTS, RESIDENT), which hides a factor of dozens in samples of a few hundred kilobytes. The
files in test_costs.py are made to show such factors. Targets called sealed are damaged inside their
checksums, by damage.py; the result may be a different valid file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parity_tests.robustness import named
from parity_tests.robustness.damage import mutated, mutated_text
from parity_tests.robustness.targets import TARGETS, Target

SECONDS = 10.0  # of processor time
PACE = 0.02  # processor seconds of pace() on the machine for which SECONDS was chosen
#: Waiting that uses no processor time is ended after this many times SECONDS.
PATIENCE = 60
#: Memory for Python's own objects (names, shapes, the network's modules), in addition to twice the file.
OBJECTS = 8 << 20
#: Resident memory that is allowed in addition to that and to the peak of the sound file: code that only an
#: error loads, pages that an allocator keeps between two reads (glibc's heaps grow to 64 MiB).
RESIDENT = 64 << 20

REFUSED, IDENTICAL, DIFFERENT = "refused", "identical", "different, no checksum in the format"
FAULTS = ("another exception", "silent difference", "too slow", "too much memory", "process died")


@dataclass
class Tally:
    """The results for the inputs of one target. ``examples``: (fault, seed, details) of the faults."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, int, str]] = field(default_factory=list)
    most_resident: int = 0  # bytes more than for the sound file

    @property
    def faults(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)


def fuzz(
    targets: Sequence[Target],
    inputs: int,
    seed: int,
    progress: Any = lambda: None,
    keep: Path | None = None,
    report: Any = lambda line: None,
) -> dict[str, Tally]:
    """Try ``inputs`` damaged files of each of ``targets``. The same ``seed`` does the same damage.

    ``keep``: the folder for the damaged files of faults.
    """
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for index, target in enumerate(targets):
            tally = tallies[target.name] = Tally()
            with _Sample(target, Path(root) / str(index)) as sample:
                for number in range(seed, seed + inputs):
                    verdict, more = sample.attempt(number)
                    tally.counts[verdict] += 1
                    if verdict in FAULTS:
                        tally.examples.append((verdict, number, more))
                        sample.keep(keep, number)
                    progress()
                tally.most_resident = sample.most_resident
            report(f"{target.name}: {dict(tally.counts)}")  # a long run may be cut short
    return tallies


class _Sample:
    """One target's sound files, a working copy to damage, and a process that reads it."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.sound, self.damaged = folder / "sound", folder / "damaged"
        self.sound.mkdir(parents=True)
        self.path = self.target.make(self.sound).relative_to(self.sound)
        self.files = sorted(p.relative_to(self.sound) for p in self.sound.rglob("*") if p.is_file())
        self.files = [file for file in self.files if file.match(target.damaged)]
        self.size = sum(p.stat().st_size for p in self.sound.rglob("*") if p.is_file())
        shutil.copytree(self.sound, self.damaged)
        self.reader: _Reader | None = None
        self.most_resident = 0  # bytes more than for the sound file

    def __enter__(self) -> _Sample:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.reader:
            self.reader.stop()

    def start(self) -> None:
        self.reader = _Reader(self.target.use)
        for _ in range(3):  # the first reading also loads the code
            status, self.expected, peaks = self.reader.read(self.sound / self.path, seconds=120)
            assert status == "read", f"the sound {self.target.name} is rejected: {self.expected}"
        self.resident = peaks.resident

    def attempt(self, seed: int) -> tuple[str, str]:
        """(verdict, details) for the damage that ``seed`` does to one of the files."""
        rng = random.Random(f"{self.target.name} {seed}")
        files = self._damage(rng)
        assert self.reader is not None
        try:
            status, result, peaks = self.reader.read(self.damaged / self.path, SECONDS)
            size = sum(p.stat().st_size for p in self.damaged.rglob("*") if p.is_file())
            size = max(size, self.target.unpacked(self.damaged / self.path))
        finally:
            self._repair(files)
        if status in FAULTS:
            if not self.reader.alive:
                self.start()
            return status, result
        twice = 2 * max(size, self.size)
        if peaks.traced > twice + OBJECTS:
            return "too much memory", f"{peaks.traced / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"
        self.most_resident = max(self.most_resident, peaks.resident - self.resident)
        if peaks.resident > twice + self.resident + RESIDENT:
            return "too much memory", (
                f"{peaks.resident / 1e6:.1f} MB resident for a file of {size / 1e6:.1f} MB, "
                f"{self.resident / 1e6:.1f} MB for the sound one"
            )
        if status == REFUSED:
            return REFUSED, result
        if result == self.expected:
            return IDENTICAL, ""
        return ("silent difference" if self.target.vouched else DIFFERENT), ", ".join(map(str, files))

    def _damage(self, rng: random.Random) -> list[Path]:
        """Damage the files; returns those that may have changed."""
        if self.target.seal:
            self.target.seal(self.damaged, rng)
            return self.files
        file = rng.choice(self.files)
        damage = mutated_text if self.target.text and rng.random() < 0.5 else mutated
        (self.damaged / file).write_bytes(damage((self.sound / file).read_bytes(), rng))
        return [file]

    def _repair(self, files: list[Path]) -> None:
        self.last = {file.name: (self.damaged / file).read_bytes() for file in files}
        for file in files:
            shutil.copyfile(self.sound / file, self.damaged / file)

    def keep(self, folder: Path | None, seed: int) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.last.items():
                (folder / f"{self.target.name} {seed} {name}").write_bytes(content)


@dataclass(frozen=True)
class Peaks:
    """The largest number of bytes added while one file was read. ``resident`` is 0 if not known."""

    traced: int = 0
    resident: int = 0


class _Reader:
    """A separate process that reads files, so that a crash or a hang is seen from outside."""

    def __init__(self, use: Callable[[Path], str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(use, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def read(self, path: Path, seconds: float) -> tuple[str, str, Peaks]:
        """(``"read"``, :data:`REFUSED` or a fault; digest, message or traceback; memory)."""
        self.connection.send((str(path), seconds))
        try:
            if self.connection.poll(PATIENCE * seconds):
                answer: tuple[str, str, Peaks] = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self.process.join()
            if self.process.exitcode == -signal.SIGXCPU:
                return "too slow", f"more than {seconds:g} s of processor time", Peaks()
            return "process died", f"exit code {self.process.exitcode}", Peaks()
        self.stop()
        return "too slow", f"no answer in {PATIENCE * seconds:g} s", Peaks()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(use: Callable[[Path], str], connection: Connection) -> None:
    from porting.errors import EfficientDetError

    warnings.simplefilter("ignore")
    slowness = max(1.0, min(pace() for _ in range(3)) / PACE)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        while True:
            name, seconds = connection.recv()
            path = Path(name)
            _limit_processor_time(seconds * slowness)
            before = _forget_peak()
            tracemalloc.start()
            try:
                status, result = "read", use(path)
            except EfficientDetError as error:
                status, result = REFUSED, str(error)
                if "\n" in result or len(result) > 2000:
                    status, result = "another exception", f"not one sentence: {result[:300]!r}"
            except BaseException:
                status, result = "another exception", traceback.format_exc(limit=-4)
            peaks = Peaks(tracemalloc.get_traced_memory()[1], _resident("VmHWM") - before if before else 0)
            tracemalloc.stop()
            connection.send((status, result, peaks))


def pace() -> float:
    """The processor time of a fixed amount of Python's own work, in seconds."""
    start = time.process_time()
    found: dict[bytes, int] = {}
    for number in range(150_000):
        found[b"%d" % number] = number & 255
    assert sum(found.values()) > 0
    return time.process_time() - start


def _limit_processor_time(seconds: float) -> None:
    """From now on; then the kernel sends SIGXCPU. Its limit is a whole number of seconds, rounded up here."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def resident_measured() -> bool:
    """Whether the system reports a process's resident peak and allows resetting it."""
    return _resident("VmHWM") > 0 and os.access("/proc/self/clear_refs", os.W_OK)


def _forget_peak() -> int:
    """Reset the resident peak; returns the bytes resident now, or 0 if that is not known."""
    if not resident_measured():
        return 0
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # else the next read reuses freed pages, unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; 0 if /proc does not have it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.robustness.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="damaged files in all (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first damaged file (default: 0)")
    parser.add_argument("--targets", help=f"comma-separated (default: all): {', '.join(TARGETS)}")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the damaged files of faults here")
    parser.add_argument("--json", action="store_true", help="print the table as JSON on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    names = named(arguments.targets, TARGETS, "target")
    each = -(-arguments.inputs // len(names))
    console = Console(stderr=arguments.json, highlight=False)
    columns = (TextColumn("damaged files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=each * len(names))
        tallies = fuzz(
            [TARGETS[name] for name in names],
            each,
            arguments.seed,
            lambda: bar.advance(task),
            arguments.keep,
            lambda line: console.print(line, markup=False),
        )
    draw(console, tallies, time.perf_counter() - start)
    if arguments.json:
        json.dump(
            {name: {"counts": t.counts, "faults": t.examples} for name, t in tallies.items()},
            sys.stdout,
            indent=2,
        )
        print()
    return 1 if any(tally.faults for tally in tallies.values()) else 0


def draw(console: Console, tallies: dict[str, Tally], seconds: float) -> None:
    table = Table("reader", "tried", REFUSED, IDENTICAL, "different\n(no checksum)", "anything else")
    for name, tally in tallies.items():
        table.add_row(name, *map(str, _row(tally)))
    table.add_section()
    table.add_row("all", *(str(sum(column)) for column in zip(*map(_row, tallies.values()), strict=True)))
    console.print(table)
    if resident_measured():
        most = max(tally.most_resident for tally in tallies.values())
        console.print(f"resident memory: at most {most / 1e6:.1f} MB more than for the sound file")
    else:
        console.print("resident memory: not measured on this system, only Python's own allocations")
    console.print(f"{seconds:.0f} s")
    for name, tally in tallies.items():
        for fault, seed, more in tally.examples[:5]:
            console.print(f"{name}, seed {seed}: {fault}\n{more}", markup=False, style="red")


def _row(tally: Tally) -> list[int]:
    good = [tally.counts[verdict] for verdict in (REFUSED, IDENTICAL, DIFFERENT)]
    return [tally.counts.total(), *good, tally.faults]


if __name__ == "__main__":
    sys.exit(main())
