"""Kill commands in the middle: ``python -m parity_tests.robustness.kills --kills 200``.

Half of the kills fall on a random moment of the run, half on a call that changes a file: before it, after
it, or with half of a write on disk. Those calls of an undisturbed run are listed first and taken in turn,
each kind of call on each file once, writes in the middle, before any comes again. After the SIGKILL the
target must be the complete old one or the complete new one; running the command again must then leave every
file as an undisturbed run does. Beside these only hidden files may be left, which the killed process could
not remove; they are counted.

``convert``, ``export to h5``, ``eval again`` and ``download again`` begin with a complete old target;
``eval``, ``download``, and ``export`` and ``release``, which replace nothing, begin with none. The commands
run in forks of this process, which has loaded PyTorch already, so that most of their time is work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parity_tests.helpers.paths import TOOLS
from parity_tests.robustness import moments, named, targets
from parity_tests.robustness.moments import MIDDLE, Calls, Moment

EVAL = (
    *("eval_coco.py", "--weights", "model.safetensors", "--coco", "coco", "--labels", "names.txt"),
    *("--batch-size", "2", "--out", "eval"),
)
DOWNLOADED = "cache/efficientdet-d0/efficientdet-d0.tar.gz"
ABSENT = "absent"
OLD, NEW, BROKEN, AGAIN = "old", "new", "broken target", "failed when run again"
LEFT, HIDDEN = "left a visible file", "left a hidden file"
FAULTS = (BROKEN, AGAIN, LEFT)
BY_TIME, BY_CALL = "any moment", "file calls"
LOG = "log"


@dataclass(frozen=True)
class Command:
    """``prepare(folder)`` makes what the command needs, and an old target if any; ``run(folder)`` is the
    command, in a process of its own; ``target`` is the file or folder in question, relative to the folder.

    ``once``: it refuses to replace a target that is there.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    target: str
    once: bool = False


# --- the commands ----------------------------------------------------------------------------------------


def tool(name: str, *arguments: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        os.chdir(folder)
        sys.argv = [name, *arguments]
        sys.path.insert(0, str(TOOLS))
        runpy.run_path(str(TOOLS / name), run_name="__main__")

    return run


def prepare_convert(folder: Path) -> None:
    targets.bundle(folder / "ckpt")
    for name in ("out.safetensors", "out.pth"):
        (folder / name).write_bytes(b"the old weights")


def prepare_export(folder: Path) -> None:
    targets.weights(".safetensors")(folder)
    (folder / "back.h5").write_bytes(b"the old weights")


def prepare_release(folder: Path) -> None:
    targets.bundle(folder / "ckpt")


def prepare_eval(folder: Path) -> None:
    from PIL import Image

    (folder / "coco").mkdir()
    images = []
    for number in range(24):
        name = f"{number}.png"
        Image.effect_noise((96, 72), number + 1).convert("RGB").save(folder / "coco" / name)
        images.append({"id": number, "file_name": name, "width": 96, "height": 72})
    box = {"bbox": [1, 1, 40, 40], "area": 1600, "iscrowd": 0, "category_id": 1}
    content = {
        "images": images,
        "annotations": [{"id": n + 1, "image_id": n, **box} for n in range(len(images))],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "coco" / "instances_val.json").write_text(json.dumps(content))
    (folder / "names.txt").write_text("thing\nb\nc\nd\ne\n")
    targets.weights(".safetensors")(folder)


def prepare_eval_again(folder: Path) -> None:
    """Older results are there, and half of the pictures are detected."""
    prepare_eval(folder)
    status = os.waitpid(_fork(tool(*EVAL), folder), 0)[1]
    assert status == 0, (folder / LOG).read_text()[-2000:]
    (folder / LOG).unlink()
    (folder / "eval" / "metrics.json").write_text('{"the old": "figures"}\n')
    (folder / "eval" / "detections.json").write_text("[]\n")
    (shard,) = (folder / "eval" / "shards").iterdir()
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[: len(lines) // 2]))


def prepare_download(folder: Path) -> None:
    (folder / "cache").mkdir()


def prepare_download_again(folder: Path) -> None:
    """A file that is no longer what its record says."""
    target = folder / DOWNLOADED
    target.parent.mkdir(parents=True)
    target.write_bytes(b"rotten")
    target.with_name(target.name + ".json").write_text(json.dumps({"sha256": "0" * 64}))


def download(folder: Path) -> None:
    from porting.sources import download as downloading
    from porting.sources.google_releases import fetch, google_release_named

    downloading.BACKOFF_SECONDS = 0.01
    release = google_release_named("efficientdet-d0")
    assert release is not None
    print(fetch(release, folder / "cache"))


@contextlib.contextmanager
def release_server() -> Iterator[None]:
    """Serves any release, slowly, from a process of its own."""
    from porting.sources.google_releases import BASE_URL_VARIABLE

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    os.environ[BASE_URL_VARIABLE], os.environ["no_proxy"] = ours.recv(), "*"
    try:
        yield
    finally:
        process.kill()
        process.join()


def _serve(connection: multiprocessing.connection.Connection) -> None:
    from parity_tests.checkpoint.test_releases import Handler, Server, encode

    class Slow(Handler):
        """In pieces, so that a kill meets a file half there."""

        def serve(self, limit: int | None = None, changed: dict[str, str | None] | None = None) -> None:
            body, start = self.server.body, 0
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", '"first"')
            self.send_header("X-Goog-Hash", f"md5={encode(hashlib.md5(body).digest())}")
            self.end_headers()
            for at in range(start, len(body), 1 << 17):
                self.wfile.write(body[at : at + (1 << 17)])
                time.sleep(0.01)

    server = Server()
    server.RequestHandlerClass = Slow
    connection.send(server.url)
    server.serve_forever()


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "convert",
            prepare_convert,
            tool("convert.py", "--ckpt", "ckpt", "--out", "out.safetensors"),
            "out.safetensors",
        ),
        Command(
            "convert to .pth",
            prepare_convert,
            tool("convert.py", "--ckpt", "ckpt", "--out", "out.pth"),
            "out.pth",
        ),
        Command(
            "export",
            prepare_export,
            tool("export.py", "--weights", "model.safetensors", "--to", "tf-checkpoint", "--out", "back"),
            "back",
            once=True,
        ),
        Command(
            "export to h5",
            prepare_export,
            tool("export.py", "--weights", "model.safetensors", "--to", "h5", "--out", "back.h5"),
            "back.h5",
        ),
        Command("eval", prepare_eval, tool(*EVAL), "eval/metrics.json"),
        Command("eval again", prepare_eval_again, tool(*EVAL), "eval/metrics.json"),
        Command("download", prepare_download, download, DOWNLOADED),
        Command("download again", prepare_download_again, download, DOWNLOADED),
        Command(
            "release",
            prepare_release,
            tool("release.py", "--ckpt", "ckpt", "--out", "release", "--size", "128"),
            "release/custom",
            once=True,
        ),
    )
}


# --- killing ---------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was found after each kill; ``examples``: (verdict, seed, more) of what must not be."""

    seconds: float
    moments: int
    by: dict[str, Counter[str]] = field(default_factory=lambda: {BY_TIME: Counter(), BY_CALL: Counter()})
    examples: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Of all kills; with :data:`HIDDEN`, which comes beside a verdict."""
        return sum(self.by.values(), Counter())

    @property
    def faults(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)


@dataclass(frozen=True)
class _Trial:
    """A command, what it begins with, and what undisturbed runs of it make of that."""

    command: Command
    start: Path
    work: Path
    old: str
    new: str
    result: dict[str, str]  # the files after an undisturbed run
    seconds: float
    moments: list[Moment]

    def attempt(self, moment: Moment | None, rng: random.Random) -> tuple[str, bool, str]:
        """Kill it once, at a random time if not at ``moment``: (verdict, hidden files are left, more)."""
        _reset(self.start, self.work)
        pid = _fork(self.command.run, self.work, Calls(self.work, moment) if moment else None)
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
            status = os.waitpid(_fork(self.command.run, self.work), 0)[1]
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
    """Three undisturbed runs, which must agree."""
    start, work, seen = root / "start", root / "work", root / "seen"
    start.mkdir()
    command.prepare(start)
    durations, results = [], []
    for _ in range(3):
        _reset(start, work)
        began = time.perf_counter()
        status = os.waitpid(_fork(command.run, work, Calls(work), seen), 0)[1]
        assert status == 0, (work / LOG).read_text()[-2000:]
        durations.append(time.perf_counter() - began)
        results.append(files(work))
    assert results[0] == results[1] == results[2], f"{command.name} writes something else each time"
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
    """In random order, but one of each kind in turn, and halves first: what is written once comes early."""
    kinds: dict[str, list[Moment]] = {}
    for moment in sorted(rng.sample(found, len(found)), key=lambda moment: moment.phase != MIDDLE):
        kinds.setdefault(moment.what, []).append(moment)
    rounds = itertools.zip_longest(*kinds.values())
    return [moment for each in rounds for moment in each if moment]


def _reset(start: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work)


def _fork(
    run: Callable[[Path], None], work: Path, calls: Calls | None = None, seen: Path | None = None
) -> int:
    """``run(work)`` in a fork; its process id. What it prints goes to :data:`LOG`.

    ``calls`` watches it, and writes what it saw to ``seen``.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(work / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if calls:
            calls.watch()
        run(work)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        with contextlib.suppress(BaseException):
            if calls and seen:
                calls.save(seen)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def files(folder: Path) -> dict[str, str]:
    """Name → digest of every file and folder in ``folder``, but the log."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: digest(path) if path.is_file() else "folder" for name, path in found.items() if name != LOG}


def digest(target: Path) -> str:
    """Of a file, or of all files of a folder."""
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
    """What the commands would spend most of their time on, once for all forks."""
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
