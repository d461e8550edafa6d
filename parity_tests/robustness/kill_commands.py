"""The commands that are killed: what each needs, how it runs in a fork, and what it writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from parity_tests.helpers.paths import TOOLS
from parity_tests.robustness import samples
from parity_tests.robustness.moments import Calls

EVAL = (
    *("eval_coco.py", "--weights", "model.safetensors", "--coco", "coco", "--labels", "names.txt"),
    *("--batch-size", "2", "--out", "eval"),
)
DOWNLOADED = "cache/efficientdet-d0/efficientdet-d0.tar.gz"
LOG = "log"


@dataclass(frozen=True)
class Command:
    """A command to kill.

    ``prepare(folder)`` makes its input files, and an old target if there is one. ``run(folder)`` is the
    command; it is called in a fork. ``target`` is the file or folder that it writes, relative to ``folder``.
    ``once``: it does not replace an existing target.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    target: str
    once: bool = False


def fork(
    run: Callable[[Path], None], work: Path, calls: Calls | None = None, seen: Path | None = None
) -> int:
    """Start ``run(work)`` in a fork and return its process id. Its output goes to :data:`LOG`.

    ``calls`` watches it and saves the calls to ``seen``.
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


def tool(name: str, *arguments: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        os.chdir(folder)
        sys.argv = [name, *arguments]
        sys.path.insert(0, str(TOOLS))
        runpy.run_path(str(TOOLS / name), run_name="__main__")

    return run


def prepare_convert(folder: Path) -> None:
    samples.bundle(folder / "ckpt")
    for name in ("out.safetensors", "out.pth"):
        (folder / name).write_bytes(b"the old weights")


def prepare_export(folder: Path) -> None:
    samples.weights(".safetensors")(folder)
    (folder / "back.h5").write_bytes(b"the old weights")


def prepare_release(folder: Path) -> None:
    samples.bundle(folder / "ckpt")


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
    samples.weights(".safetensors")(folder)


def prepare_eval_again(folder: Path) -> None:
    """Older results exist, and half of the images are already done."""
    prepare_eval(folder)
    status = os.waitpid(fork(tool(*EVAL), folder), 0)[1]
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
    """A file that does not match its record."""
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
    """Serve any release, slowly, from a separate process."""
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
    from parity_tests.helpers.servers import Handler, Server, encode

    class Slow(Handler):
        """Sends in pieces, so that a kill can leave half of a file."""

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
