"""What every command line here shares: finding the packages, one way to fail, one look."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

# Until `run` takes over, Ctrl-C ends the imports at once: nothing has been started that needs an end.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# Run from a clone, the packages lie beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# TensorFlow, where a tool imports it, should not talk over the tables.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Eigen's plain float32, as in the recordings of Google's code; oneDNN fuses, and announces itself.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

EXIT_FAILED = 1  # a check ran and failed
EXIT_USAGE = 2  # bad usage or bad input
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells report it: `| head` is no failed check

EXIT_CODES = (
    "exit status: 0 done; 1 a check failed; 2 bad usage or input; 130 interrupted; 141 pipe closed;\n"
    "143 ended by SIGTERM (129 SIGHUP), nothing left half-written"
)

SIZE_HELP = "N, HxW or native: the picture to verify on (default: the model's own, at most 512)"


# Where a stream was closed (`>&-`), Python has none, and the next file opened would get its number.
sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class Ended(BaseException):
    """A signal asks for the end; the argument is its number. As KeyboardInterrupt, it unwinds what runs."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a tool's ``main`` and exit with its status; what a user can cause ends in one sentence."""
    from porting.errors import CheckFailedError, EfficientDetError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the rest
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _replace_handlers(signal.SIG_DFL, _end)  # one that is ignored, as under nohup, stays so
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; an interrupt could only hide that
        sys.stdout.flush()
    except CheckFailedError as error:
        fail(str(error))
        status = EXIT_FAILED
    except EfficientDetError as error:
        status = fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing was left half-written")
        status = EXIT_INTERRUPTED
    except Ended as end:
        _replace_handlers(_end, signal.SIG_IGN)  # another one could only break the ending off
        fail(f"ended by {signal.Signals(end.args[0]).name}; nothing was left half-written")
        status = 128 + end.args[0]
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        status = fail("out of memory; try a smaller --batch-size or --size")
    except BrokenPipeError:
        _silence_output()
        status = EXIT_CLOSED_PIPE
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        status = EXIT_CLOSED_PIPE  # rich ends the process itself, with status 1
    except OSError as error:
        status = fail(_of_the_system(error))
    sys.exit(status)


def end_at_once_when_told() -> None:
    """Give SIGTERM and SIGHUP back their default action, for work that waits outside Python for others.

    A handler in Python runs when that wait is over, which may take days; files are complete or absent without
    it too. One that is ignored stays so.
    """
    _replace_handlers(_end, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    """The handler; it stays in place, as what it raises may be swallowed, by a ``__del__`` for one."""
    raise Ended(number)


def _replace_handlers(old: object, new: Any) -> None:
    """Of SIGTERM and SIGHUP, where it is ``old``."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == old:
            signal.signal(number, new)


def _of_the_system(error: OSError) -> str:
    """What nobody closer to it has explained, in one sentence. Errors of printing name no file."""
    reason = error.strerror or str(error)
    if isinstance(error.filename, (str, bytes)):
        return f"{os.fsdecode(error.filename)}: {reason}; check the path, its permissions and the disk"
    try:
        print(end="", flush=True)  # what could not be printed is still pending; nothing is added to it
    except OSError:
        _silence_output()
        return f"cannot print: {reason}; check where the output goes"
    return f"{reason}; check the paths given, their permissions and the disk"


def _silence_output() -> None:
    """Python flushes standard output once more when it ends; that must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: BaseException) -> bool:
    """Whatever says so: Python, PyTorch on a GPU (not imported here), PyTorch's allocator on the CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is the GPU where there is one, of several the one numbered ``local_rank``.

    Raises :class:`EfficientDetError` when the device cannot be used.
    """
    import torch

    from porting.errors import EfficientDetError

    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EfficientDetError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def fail(message: str) -> int:
    """Print ``message`` as one line, whatever names it quotes; the status of bad usage or input."""
    from pytorch_model.errors import one_line

    with suppress(OSError):  # there is nobody left to tell
        print(f"error: {one_line(message)}", file=sys.stderr)
    return EXIT_USAGE
