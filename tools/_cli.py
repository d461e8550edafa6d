"""What every command line here shares: finding the packages, one way to fail, one look."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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

EXIT_CODES = "exit status: 0 done; 1 a check failed; 2 bad usage or input; 130 interrupted"

SIZE_HELP = "N, HxW or native: the picture to verify on (default: the model's own, at most 512)"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a tool's ``main`` and exit with its status; what a user can cause ends in one sentence."""
    from porting.errors import CheckFailedError, PortingError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the rest
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; an interrupt could only hide that
        sys.stdout.flush()
    except CheckFailedError as error:
        fail(str(error))
        status = EXIT_FAILED
    except PortingError as error:
        status = fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing was left half-written")
        status = EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        status = fail("out of memory; try a smaller --batch-size or --size")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_FAILED
    except OSError as error:
        status = fail(f"cannot print: {error.strerror or error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whatever says so: Python, PyTorch on a GPU (not imported here), PyTorch's allocator on the CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is the GPU where there is one, of several the one numbered ``local_rank``.

    Raises :class:`PortingError` when the device cannot be used.
    """
    import torch

    from porting.errors import PortingError

    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PortingError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USAGE
