"""Failures of the disk, a folder or another process: the old target stays, or the new one is complete."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from parity_tests.helpers.paths import ROOT, TOOLS
from parity_tests.robustness import kill_commands, samples
from parity_tests.robustness.kill_commands import EVAL
from parity_tests.robustness.kills import digest
from porting.cli.process import run as run_main
from porting.errors import OutputError
from pytorch_model import load_model
from pytorch_model.files import check_writable, new_folder, replacing

SLOWLY = ("--hparams", "image_size=512x512")
LARGEST_FILE = 30_000  # bytes; less than any of the targets

CONVERT = ("convert.py", "--ckpt", "ckpt", "--out", "out.safetensors")
FULL: dict[str, tuple[Sequence[str], str]] = {
    "convert": (CONVERT, "out.safetensors"),
    "convert to .pth": (("convert.py", "--ckpt", "ckpt", "--out", "out.pth"), "out.pth"),
    "export": (
        ("export.py", "--weights", "model.safetensors", "--to", "tf-checkpoint", "--out", "back"),
        "back",
    ),
    "export h5": (
        ("export.py", "--weights", "model.safetensors", "--to", "h5", "--out", "back.h5"),
        "back.h5",
    ),
    "export effdet": (
        ("export.py", "--weights", "d0.safetensors", "--to", "effdet", "--out", "effdet.pth"),
        "effdet.pth",
    ),
    "detect": (
        ("detect.py", "--weights", "model.safetensors", "--images", "picture.png", "--out", "found"),
        "found/picture.png",
    ),
}


def disk_full() -> None:
    """Make writing fail in the middle of a file, as on a full disk: after :data:`LARGEST_FILE` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    from pytorch_model import create_model
    from pytorch_model.weights.files import write_weights

    folder = tmp_path_factory.mktemp("inputs")
    kill_commands.prepare_convert(folder)
    samples.weights(".safetensors")(folder)
    model = create_model("efficientdet-d0", image_size=(64, 64))
    write_weights(folder / "d0.safetensors", model.state_dict(), model.config, {})
    Image.effect_noise((200, 200), 80).convert("RGB").save(folder / "picture.png")
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(inputs, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "coco").mkdir()
    kill_commands.prepare_eval(tmp_path / "coco")
    return tmp_path / "coco"


def run(
    work: Path, command: Sequence[str], before: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``work``. ``before`` runs first, in the command's process."""
    return subprocess.run(
        [sys.executable, TOOLS / command[0], *command[1:]],
        cwd=work,
        capture_output=True,
        text=True,
        preexec_fn=before,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk(work: Path, name: str) -> None:
    command, target = FULL[name]
    before = {path.relative_to(work) for path in work.rglob("*")}
    old = digest(work / target)
    done = run(work, command, disk_full)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    name = target.split("/")[0]
    assert re.search(rf"error: (cannot write {name}|{name}/model cannot be written)", done.stderr)
    assert digest(work / target) == old
    after = {path.relative_to(work) for path in work.rglob("*")}
    assert after - before <= {Path(target).parent}, "something is left over"


def test_the_folder_vanishes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    message = r"cannot write .*weights\.pth: .*; free some space or choose another place"

    def write() -> None:
        with replacing(tmp_path / "out" / "weights.pth") as temporary:
            temporary.write_bytes(b"new")
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(OutputError, match=message):
        write()
    assert not (tmp_path / "out").exists()


def heed_permissions() -> None:
    """From now on, permissions apply to root too."""
    if os.geteuid() == 0:
        drop_from_bounding_set, dac_override = 24, 1
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0) == 0


LOCKED = {
    "convert": ("convert.py", "--ckpt", "ckpt", "--out", "locked/x.safetensors"),
    "export": (
        *("export.py", "--weights", "model.safetensors", "--to", "tf-checkpoint"),
        *("--out", "locked/back"),
    ),
    "export h5": ("export.py", "--weights", "model.safetensors", "--to", "h5", "--out", "locked/back.h5"),
    "detect": ("detect.py", "--weights", "model.safetensors", "--images", "picture.png", "--out", "locked"),
    "evaluate": ("eval_coco.py", "--weights", "model.safetensors", "--coco", "coco", "--out", "locked"),
    "verify": ("verify.py", "--ckpt", "ckpt", "--report", "locked"),
    "release": ("release.py", "--ckpt", "ckpt", "--out", "locked"),
    "download": ("convert.py", "--ckpt", "efficientdet-d0", "--cache-dir", "locked"),
}


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", LOCKED)
def test_a_folder_that_is_not_writable(work: Path, name: str) -> None:
    """The error comes before the work, so nothing else is printed."""
    if name == "evaluate":
        kill_commands.prepare_eval(work)
    (work / "locked").mkdir(mode=0o500)
    done = run(work, LOCKED[name], heed_permissions)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(
        "error: (cannot write )?locked.*: Permission denied; (choose|free some space or give) .*\n",
        done.stderr,
    )
    assert not re.search("[a-z]", done.stdout)
    assert not list((work / "locked").iterdir())


@pytest.mark.parametrize("check", [check_writable, replacing], ids=["before", "after"])
def test_only_files_are_replaced(check: Callable[[Path], Any], pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", Path("/dev/null")):
        message = "it is a pipe or a device, not a file; give a file name"
        with pytest.raises(OutputError, match=message), check(path) or nullcontext():
            raise AssertionError("it was not rejected")
        assert not path.is_file()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", pipe]


@pytest.mark.parametrize("character", ["q", "é", "日"])
def test_the_longest_names(character: str, tmp_path: Path) -> None:
    """The limit is 255 bytes, also for the temporary name."""
    bytes_left = 255 - len(".safetensors")
    path = tmp_path / f"{character * (bytes_left // len(character.encode()))}.safetensors"
    check_writable(path)
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    folder = tmp_path / (character * (255 // len(character.encode())))
    with new_folder(folder) as temporary:
        (temporary / "a").write_bytes(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, folder])
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long; choose"):
        check_writable(path.with_name(f"{character * 3}{path.name}"))


def test_two_at_once(work: Path) -> None:
    """Both write the same file; it is complete, whichever was last."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    both = [subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert load_model(work / "out.safetensors").config.num_classes == samples.CONFIG.num_classes
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_two_evaluations_at_once(coco: Path) -> None:
    """The second one does not start, because the kept results would mix."""
    (coco / "eval").mkdir()
    with open(coco / "eval" / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(coco, EVAL)
    assert done.returncode == 2
    assert "error: another evaluation is running in eval; wait for it, or choose another --out" in done.stderr
    assert [path.name for path in (coco / "eval").rglob("*.*")] == [".lock"]
    command = [sys.executable, str(TOOLS / EVAL[0]), *EVAL[1:]]
    both = [subprocess.Popen(command, cwd=coco, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(process.wait() for process in both) in ([0, 0], [0, 2])
    both_ran = digest(coco / "eval" / "metrics.json")
    assert run(coco, (*EVAL, "--restart")).returncode == 0
    assert digest(coco / "eval" / "metrics.json") == both_ran


def test_out_of_memory(coco: Path) -> None:
    """The first convolution of 24 such images needs 6 GB."""
    assert run(coco, EVAL).returncode == 0
    old = digest(coco / "eval" / "metrics.json")
    (coco / "eval").rename(coco / "before")
    large = (*EVAL, "--batch-size", "24", "--hparams", "image_size=2048x4096")
    done = run(coco, large, little_memory)
    assert done.returncode == 2, done.stderr
    assert "error: out of memory; try a smaller --batch-size or --size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (coco / "eval" / "metrics.json").exists()
    assert run(coco, EVAL).returncode == 0
    assert digest(coco / "eval" / "metrics.json") == old


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


@pytest.mark.slow
def test_a_worker_is_killed_for_its_memory(coco: Path) -> None:
    """The kernel sends SIGKILL. The others end too, and the next run goes on to the same figures."""
    assert run(coco, (*EVAL, *SLOWLY)).returncode == 0
    undisturbed = digest(coco / "eval" / "metrics.json")
    shutil.rmtree(coco / "eval")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(TOOLS / EVAL[0]), *EVAL[1:], *SLOWLY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.Popen(command, cwd=coco, stderr=subprocess.PIPE, text=True, env=environment)
    kept = coco / "eval" / "shards" / "ours-1.jsonl"
    while whole.poll() is None and not kept.exists():
        time.sleep(0.01)
    os.kill(worker(whole.pid, rank=1), signal.SIGKILL)
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode not in (0, None), errors
    assert not (coco / "eval" / "metrics.json").exists()
    assert kept.exists()
    done = subprocess.run(command, cwd=coco, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert digest(coco / "eval" / "metrics.json") == undisturbed


def worker(parent: int, rank: int) -> int:
    """The process id of the ``rank``-th process that torchrun, of process id ``parent``, started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "status").read_text()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and b"RANK=%d" % rank in variables:
            return int(folder.name)
    raise AssertionError(f"torchrun has no process {rank}")


#: Each reading of the clock is an hour earlier than the one before.
BACKWARDS = """
import itertools, time
hours = itertools.count()
time.time = lambda: 1e9 - 3600.0 * next(hours)
time.time_ns = lambda: int(time.time()) * 10**9
"""

CLOCKED = {
    "convert": (CONVERT, "out.safetensors"),
    "convert to .pth": FULL["convert to .pth"],
    "export": FULL["export"],
    "export h5": FULL["export h5"],
    "eval": (EVAL, "eval/metrics.json"),
    "release": (("release.py", "--ckpt", "ckpt", "--out", "release", "--size", "128"), "release/custom"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOCKED)
def test_the_clock_goes_backwards(work: Path, coco: Path, tmp_path: Path, name: str) -> None:
    """Nothing written depends on the time: neither the clock nor the times of files."""
    command, target = CLOCKED[name]
    shutil.copytree(coco, work, dirs_exist_ok=True)
    odd = tmp_path / "odd"
    shutil.copytree(work, odd)
    for number, path in enumerate(sorted(odd.rglob("*"))):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))  # 1970, 2096
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(BACKWARDS)
    assert run(work, command).returncode == 0
    done = run(odd, command, PYTHONPATH=str(tmp_path / "clock"))
    assert done.returncode == 0, done.stderr
    assert digest(odd / target) == digest(work / target)


#: Stops in the middle of unpacking: after the first data file.
UNPACKING = """
import sys, time
sys.path.insert(0, sys.argv.pop())
from porting.checkpoint import unpack
from porting.cli import main, process

def copy_and_wait(member, data, target, plainly=unpack._copy):
    plainly(member, data, target)
    if ".data-" in target.name:
        print("unpacking", flush=True)
        time.sleep(600)

unpack._copy = copy_and_wait
process.run(lambda: main.execute("inspect", ["--ckpt", "big.tar"]))
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_signals_leave_nothing_unpacked(work: Path, number: int, status: int) -> None:
    (work / "tmp").mkdir()
    with tarfile.open(work / "big.tar", "w") as tar:
        for path in sorted((work / "ckpt").iterdir()):
            tar.add(path, f"model/{path.name}")
    process = subprocess.Popen(
        [sys.executable, "-c", UNPACKING, str(ROOT)],
        cwd=work,
        env={**os.environ, "TMPDIR": str(work / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup ignores hangups
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "unpacking\n"
    assert list((work / "tmp").rglob("*.data-*"))
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert re.fullmatch("error: (ended by SIG[A-Z]+|interrupted); nothing was left half-written\n", errors)
    assert not list((work / "tmp").iterdir())


IMPORTING = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from porting.cli import main, process

class Swallows:
    def find_spec(self, name, *_):
        if name == "porting.cli.commands.inspect":
            try:
                signal.raise_signal(int(sys.argv[2]))
            except BaseException:
                print("swallowed")

sys.meta_path.insert(0, Swallows())
process.run(lambda: main.execute("inspect", ["--ckpt", "nothing"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_during_the_imports_end_at_once(number: int) -> None:
    """PyTorch swallows any error that is raised while it imports NumPy."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(ROOT), str(int(number))],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup ignores hangups
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


ENDED = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from porting.cli import process

class Swallows:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)  # Python prints exceptions of __del__ and goes on

def fail(message, plainly=process.fail):
    signal.raise_signal(signal.SIGTERM)
    return plainly(message)

def main():
    Swallows()
    print("swallowed", flush=True)
    process.fail = fail
    signal.raise_signal(signal.SIGTERM)
    return 0

process.run(main)
"""


def test_a_signal_ends_the_command_even_if_an_earlier_one_was_swallowed() -> None:
    command = [sys.executable, "-c", ENDED, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "swallowed\n"), done.stderr
    assert done.stderr.endswith("\nerror: ended by SIGTERM; nothing was left half-written\n")


SLEEPER = """
import time
from pytorch_model.evaluation.processes import joined
with joined():
    print("joined", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("ignored", "sent"),
    [((), (signal.SIGHUP,)), ((signal.SIGHUP,), (signal.SIGHUP, signal.SIGTERM))],
    ids=["SIGHUP", "nohup"],
)
def test_signals_end_a_process_that_waits_for_another(
    coco: Path, ignored: Sequence[int], sent: Sequence[int]
) -> None:
    """It waits inside gloo, where no Python handler runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment = {**os.environ, **where, "PYTHONPATH": str(TOOLS.parent)}

    def handlers() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored if the tests run under nohup
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    waiting = subprocess.Popen(
        [sys.executable, TOOLS / EVAL[0], *EVAL[1:]],
        cwd=coco,
        env={**environment, "RANK": "1"},
        preexec_fn=handlers,
    )
    first = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], env={**environment, "RANK": "0"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "joined\n"
        time.sleep(0.5)  # until the other waits; a default action works at any time
        for number in sent:
            waiting.send_signal(number)
        assert waiting.wait(timeout=300) == -sent[-1]
    finally:
        for process in (first, waiting):
            process.kill()
            process.communicate()


def test_hangups_that_are_ignored_stay_ignored(work: Path) -> None:
    """nohup sets this."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    process = subprocess.Popen(
        command,
        cwd=work,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    assert process.wait() == 0


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)], ids=str)
def test_closed_streams(work: Path, closed: tuple[int, ...]) -> None:
    """Nothing can be printed, and no file takes a stream's number and receives the output."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    plain = subprocess.run(command, cwd=work, capture_output=True)
    whole = digest(work / "out.safetensors")
    done = subprocess.run(command, cwd=work, capture_output=True, preexec_fn=lambda: [*map(os.close, closed)])
    assert (plain.returncode, done.returncode) == (0, 0), done.stderr
    assert digest(work / "out.safetensors") == whole


@pytest.mark.parametrize("moment", [0.3, 0.8, 1.0])
def test_interrupts(work: Path, moment: float) -> None:
    """Ctrl-C at several points of the run: exit status 130, or complete; nothing is left over."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    before = {path.name for path in work.iterdir()}
    old = digest(work / "out.safetensors")
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    new = digest(work / "out.safetensors")
    (work / "out.safetensors").write_bytes(b"the old weights")
    assert digest(work / "out.safetensors") == old != new
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        used = _cpu_seconds(process.pid)
        if used > moment * 2.0:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate()
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors
    # An interrupt between the renaming and the end finds the new file there.
    assert digest(work / "out.safetensors") in ((old, new) if process.returncode else (new,))
    assert {path.name for path in work.iterdir()} == before


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


LONG = "q" * 300

LONG_NAMES = {
    "weights": ("detect.py", "--weights", LONG, "--images", "picture.png", "--out", "found"),
    "images": ("detect.py", "--weights", "model.safetensors", "--images", LONG, "--out", "found"),
    "coco": ("eval_coco.py", "--weights", "model.safetensors", "--coco", LONG, "--out", "found"),
    "release": ("release.py", "--verify-release", LONG),
    "cache": ("inspect_checkpoint.py", "--ckpt", "efficientdet-d0", "--cache-dir", LONG),
    "labels": (
        *("detect.py", "--weights", "model.safetensors", "--images", "picture.png", "--out", "found"),
        *("--labels", LONG),
    ),
}


@pytest.mark.parametrize("name", LONG_NAMES)
def test_too_long_a_name_is_named_in_the_error(work: Path, name: str) -> None:
    done = run(work, LONG_NAMES[name])
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: .*q{300}.*", error), error
    assert not re.search(r"cannot print|Traceback|Errno", done.stderr)


def test_a_closed_pipe_is_not_a_failed_check(work: Path) -> None:
    """The status is the one that a shell reports for SIGPIPE: 128 + its number."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(TOOLS / "inspect_checkpoint.py"), "--ckpt", "ckpt"]
    done = subprocess.run(command, cwd=work, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_do_not_control_the_terminal(work: Path) -> None:
    name = "a\x1b[31m\nb\x9b\u202ec\udcff"
    done = run(work, ("inspect_checkpoint.py", "--ckpt", name), PYTHONUTF8="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert r"a\x1b[31m\nb\x9b\u202ec\udcff" in done.stderr
    assert done.stderr.strip().isprintable()


def test_other_system_errors_are_not_reported_as_printing(capsys: pytest.CaptureFixture[str]) -> None:
    """The last resort, for errors that no code closer to them explains."""

    def end(error: OSError) -> str:
        def main() -> int:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""  # with --json, a program reads it
        return err.strip()

    assert end(OSError(errno.EIO, "I/O error", "/x/y")) == (
        "error: /x/y: I/O error; check the path, its permissions and the disk"
    )
    assert end(OSError(errno.ENOSPC, "No space left on device")) == (
        "error: No space left on device; check the paths given, their permissions and the disk"
    )
