"""Kill commands in the middle: ``python -m parity_tests.robustness.kills --kills 200``.

Each run begins with a complete old target and ends by SIGKILL at a random moment. What is there then must be
the complete old target or the complete new one, and running the command again must give the new one. The
commands run in forks of this process, which has loaded PyTorch already, so that most of their time is work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parity_tests.robustness import named, targets

TOOLS = Path(__file__).resolve().parents[2] / "tools"
EVAL = (
    *("eval_coco.py", "--weights", "model.safetensors", "--coco", "coco", "--labels", "names.txt"),
    *("--batch-size", "2", "--out", "eval"),
)
ABSENT = "absent"
OLD, NEW, BROKEN, AGAIN = "old", "new", "broken target", "failed when run again"


@dataclass(frozen=True)
class Command:
    """``prepare(folder)`` makes what the command needs, and an old target; ``run(folder)`` is the command, in
    a process of its own; ``target`` is the file or folder in question, relative to the folder. ``once``: it
    refuses to replace a target that is there."""

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


def prepare_download(folder: Path) -> None:
    (folder / "cache").mkdir()


def download(folder: Path) -> None:
    from porting import download as downloading
    from porting.releases import fetch, release_named

    downloading.BACKOFF_SECONDS = 0.01
    release = release_named("efficientdet-d0")
    assert release is not None
    print(fetch(release, folder / "cache"))


@contextlib.contextmanager
def release_server() -> Iterator[None]:
    """Serves any release, slowly, from a process of its own."""
    from porting.releases import BASE_URL_VARIABLE

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
    from parity_tests.test_releases import Handler, Server, encode

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
            "eval",
            prepare_eval,
            tool(*EVAL),
            "eval/metrics.json",
        ),
        Command("download", prepare_download, download, "cache/efficientdet-d0/efficientdet-d0.tar.gz"),
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

    counts: Counter[str]
    seconds: float
    examples: list[tuple[str, int, str]]

    @property
    def faults(self) -> int:
        return self.counts[BROKEN] + self.counts[AGAIN]


def kill(command: Command, kills: int, seed: int, progress: Callable[[], None] = lambda: None) -> Tally:
    """Run ``command`` and kill it, ``kills`` times."""
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        start, work = Path(root) / "start", Path(root) / "work"
        start.mkdir()
        command.prepare(start)
        old = digest(start / command.target)
        durations, news = [], set()
        for _ in range(3):
            _reset(start, work)
            began = time.perf_counter()
            pid = _fork(command, work)
            assert os.waitpid(pid, 0)[1] == 0, (work / "log").read_text()[-2000:]
            durations.append(time.perf_counter() - began)
            news.add(digest(work / command.target))
        assert len(news) == 1, f"{command.name} writes something else each time"
        assert old not in news
        tally = Tally(Counter(), statistics.median(durations), [])
        for number in range(seed, seed + kills):
            _reset(start, work)
            verdict, more = _attempt(command, work, old, news, random.Random(number), tally.seconds)
            tally.counts[verdict] += 1
            if verdict in (BROKEN, AGAIN):
                tally.examples.append((verdict, number, more))
            progress()
    return tally


def _attempt(
    command: Command, work: Path, old: str, news: set[str], rng: random.Random, seconds: float
) -> tuple[str, str]:
    pid = _fork(command, work)
    time.sleep(rng.uniform(0, 1.05 * seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = digest(work / command.target)
    if found != old and found not in news:
        return BROKEN, ", ".join(sorted(str(p.relative_to(work)) for p in work.rglob("*")))
    if command.once and found in news:
        return NEW, ""
    status = os.waitpid(_fork(command, work), 0)[1]
    if status or digest(work / command.target) not in news:
        return AGAIN, (work / "log").read_text()[-500:]
    return (NEW if found in news else OLD), ""


def _reset(start: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work)


def _fork(command: Command, work: Path) -> int:
    """Run ``command`` in ``work``, in a fork, and return its process id. What it prints goes to ``log``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        command.run(work)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def digest(target: Path) -> str:
    """Of a file, or of all visible files of a folder; hidden ones are what a command was at work on."""
    if not target.exists():
        return ABSENT
    content = hashlib.sha256()
    for path in [target] if target.is_file() else sorted(target.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (".part", ".lock"):
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
            console.print(f"{name}: {dict(tally.counts)}")  # a long run may be cut short
    draw(console, tallies)
    if arguments.json:
        found = {name: {**tally.counts, "seconds": tally.seconds} for name, tally in tallies.items()}
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
    table = Table("command", "seconds", "kills", "old target", "new target", "anything else")
    for name, tally in tallies.items():
        numbers = (tally.counts.total(), tally.counts[OLD], tally.counts[NEW], tally.faults)
        table.add_row(name, f"{tally.seconds:.2f}", *map(str, numbers))
    console.print(table)
    for name, tally in tallies.items():
        for verdict, seed, more in tally.examples[:5]:
            console.print(f"{name}, seed {seed}: {verdict}\n{more}", markup=False, style="red")


if __name__ == "__main__":
    sys.exit(main())
