"""One process of a command: signals, exit statuses, and one way to fail."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

# Until `run` takes over, Ctrl-C ends the imports at once: nothing has been started that needs an end.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# TensorFlow, if a command imports it, must not print over the tables.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Eigen's plain float32, as in the recordings of Google's code; oneDNN fuses operations and prints a notice.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

EXIT_FAILED = 1  # a check ran and failed
EXIT_USAGE = 2  # bad usage or bad input
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells report it: `| head` is not a failed check

_INTERRUPT = signal.default_int_handler

EXIT_CODES = (
    "exit status: 0 done; 1 a check failed; 2 bad usage or input; 130 interrupted; 141 pipe closed;\n"
    "143 ended by SIGTERM (129 SIGHUP), nothing left half-written"
)

# If a stream was closed (`>&-`), Python has none, and the next file opened would get its number.
sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class Ended(BaseException):
    """A signal asks the process to end; the argument is its number. It unwinds like KeyboardInterrupt."""


def run(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and exit with its status; every error that a user can cause becomes one sentence."""
    from pytorch_model.errors import EfficientDetError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still gets the rest
    try:
        signal.signal(signal.SIGINT, _INTERRUPT)
        _replace_handlers(signal.SIG_DFL, _end)  # a signal that is ignored, as under nohup, stays ignored
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; an interrupt could only hide that
        sys.stdout.flush()
    except EfficientDetError as error:
        fail(str(error))
        status = EXIT_FAILED if _is_failed_check(error) else EXIT_USAGE
    except KeyboardInterrupt:
        fail("interrupted; nothing was left half-written")
        status = EXIT_INTERRUPTED
    except Ended as end:
        _replace_handlers(_end, signal.SIG_IGN)  # another one could only break off the ending
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
        status = fail(_system_error(error))
    sys.exit(status)


def fail(message: str) -> int:
    """Print ``message`` as one line on stderr; returns the status of bad usage or input."""
    from pytorch_model.errors import one_line

    with suppress(OSError):  # nobody is left to read it
        print(f"error: {one_line(message)}", file=sys.stderr)
    return EXIT_USAGE


def print_json(content: Any) -> None:
    """Print ``content`` on stdout for a program to read: what ``--json`` asks for."""
    json.dump(content, sys.stdout, indent=2)
    print()


@contextmanager
def imports() -> Iterator[None]:
    """Inside, signals that would raise an error end the process at once.

    PyTorch swallows an error raised while it imports NumPy, and work would go on with half of NumPy.
    """
    raising = {number: handler for number, handler in _handlers() if handler in (_end, _INTERRUPT)}
    try:
        for number in raising:
            signal.signal(number, lambda number, _: os._exit(128 + number))
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)


def end_at_once_on_signals() -> None:
    """Give SIGTERM and SIGHUP back their default action, for work that waits outside Python for others.

    A handler in Python runs when that wait is over, which may take days; files are complete or absent without
    it too. A signal that is ignored stays ignored.
    """
    _replace_handlers(_end, signal.SIG_DFL)


def _is_failed_check(error: Exception) -> bool:
    from porting.errors import CheckFailedError

    return isinstance(error, CheckFailedError)


def _end(number: int, _: object) -> NoReturn:
    """The handler. It stays in place, because its exception may be swallowed, as in a ``__del__``."""
    raise Ended(number)


def _replace_handlers(old: object, new: Any) -> None:
    """Replace the handlers of SIGTERM and SIGHUP that are ``old``."""
    for number, handler in _handlers():
        if number != signal.SIGINT and handler == old:
            signal.signal(number, new)


def _handlers() -> list[tuple[int, Any]]:
    """The signals that a command answers, and how it does now. Windows has no SIGHUP."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [(number, signal.getsignal(number)) for number in numbers]


def _system_error(error: OSError) -> str:
    """One sentence for an error that no code closer to it has explained. Errors of printing name no file."""
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
    """Memory errors of Python, of PyTorch on a GPU (not imported here), of PyTorch's allocator on the CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)
