"""The pickle in a ``.pth``: examined before PyTorch follows it, then followed without running code.

``torch.load(weights_only=True)`` runs no code, but a small file can still make it fill gigabytes or compute
for years. Measured with torch 2.13, in both of its file formats:

- ``bytearray`` of a number: 361 bytes fill 5 GB.
- Tuples, each twice in the next: each level doubles the time to hash the last one, as a key or in a set.
  26 levels, in 513 bytes, take 12 seconds; 60 would take thousands of years. The time also doubles for the
  error message that shows such a tuple.
- One long list made into a set, or one long string encoded, again and again: 146 kB fill 0.6 GB, and ten
  times as many calls ten times as much.

So the instructions are read here, the sizes of the objects are added up, and nothing is built.

Sources: Python's ``pickletools``; PyTorch's ``_weights_only_unpickler.py`` for the instructions and
``serialization.py`` for which bytes of the file are the pickle.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from pytorch_model.errors import Reason, WeightsError, first_line
from pytorch_model.files import sha256_of_file
from pytorch_model.weights.checks import DIGEST

#: Of the pickle alone; the tensors are outside it. D7x's has 0.3 MB, with averages and an optimizer's 0.9 MB.
MOST_BYTES = 2 << 20
#: Instructions, values and characters, counted each time that hashing or copying meets them. D7x's come to
#: 1.6 million, with averages and an optimizer's to about 6 million. Counting the limit takes seconds.
MOST_WORK = 12_000_000

#: torch.hub's convention: the name ends in the first digits of the file's SHA-256.
NAMED_BY_HASH = re.compile(r".*-([0-9a-f]{8,64})\.pth")

#: The errors of :func:`check_pickles` for a file that must not be read.
_REJECTIONS = (
    Reason,
    ValueError,
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
)
_ZIP = b"PK\3\4"
#: Files of PyTorch before 1.6 hold a mark, a version, facts of the system, the content, the tensors' keys.
_LEGACY_MARK, _LEGACY_VERSION, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 1001, 5

#: The functions that tensors, and other values in a training file, are made with. PyTorch checks its own
#: names. ``bytearray`` is missing on purpose: it makes as many bytes as a number says.
_KNOWN = frozenset(
    (
        *("collections OrderedDict", "collections Counter", "_codecs encode"),
        *("builtins set", "builtins complex", "__builtin__ set", "__builtin__ complex"),
    )
)

#: The instructions that PyTorch follows: those that use values on the stack, with how many (None: all since
#: the last mark), those that put such values into the object below them, and those that add one value.
_USES = {
    **dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS")),
    **dict.fromkeys(("TUPLE1", "BINPERSID", "APPEND", "BUILD", "STOP"), 1),
    **dict.fromkeys(("TUPLE2", "REDUCE", "NEWOBJ", "SETITEM"), 2),
    "TUPLE3": 3,
}
_FILLS = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"))
_ADDS = frozenset(
    (
        *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    )
)


def load_pth(path: Path) -> Any:
    """The object that ``torch.save`` wrote at ``path``. Code in it is not run.

    A file of tensors alone carries no digest. If its name is ``NAME-xxxxxxxx.pth``, as releases and
    torch.hub name files, the digits are compared with its SHA-256. Raises :class:`WeightsError` on code and
    on anything else that tensors do not need, on a file that unpacks to more than its size, and on another
    hash. torch's own errors pass on a damaged file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} unpacks to more than its size, which torch.save never writes; download it again"
            )
    try:
        check_pickles(path)
    except _REJECTIONS as error:
        raise _not_tensors(path, first_line(error)) from None
    import torch

    try:
        with warnings.catch_warnings():  # warnings about a file that is then rejected
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not (isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)):
            raise
        raise _not_tensors(path, "its pickle holds more than tensors, such as code, or is broken") from None
    named = NAMED_BY_HASH.fullmatch(path.name)
    if named and not _has_digest(content) and not sha256_of_file(path).startswith(named[1]):
        raise WeightsError(
            f"{path} is damaged or misnamed: its SHA-256 does not begin with the {named[1]} in its name; "
            "download it again, or, if these digits mean something else, rename it"
        )
    return content


def _not_tensors(path: Path, reason: str) -> WeightsError:
    """Replaces PyTorch's text, which goes on to explain how to run the code."""
    return WeightsError(
        f"{path} is damaged or not a weight file ({reason}; nothing in it was run); fetch it from where it "
        "was published, convert it again, or save the state dict alone"
    )


def _has_digest(content: Any) -> bool:
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and DIGEST in metadata


def check_pickles(path: Path) -> None:
    """Raise :class:`Reason` for a ``.pth`` whose pickle does more than tensors need.

    Also raises OSError, and the errors of pickletools and zipfile on damage.
    """
    with path.open("rb") as file:
        head = file.read(MOST_BYTES + 1)
    if head.startswith(_ZIP):
        _check(_zipped(path))
        return
    if zipfile.is_zipfile(path):  # the directory at the end, which PyTorch does not read
        raise Reason("it is an archive behind something else")
    _check_legacy(BytesIO(head))


def _zipped(path: Path) -> BytesIO:
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename.lower() for entry in archive.infolist()]  # PyTorch's reader ignores case
        pickles = [entry for entry in archive.infolist() if entry.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise Reason(f"it has {len(pickles)} pickles, or the same name twice")
        if pickles[0].file_size > MOST_BYTES:
            raise Reason(f"its pickle has more than {MOST_BYTES:,} bytes")
        return BytesIO(archive.read(pickles[0]))


def _check_legacy(data: BytesIO) -> None:
    try:
        for number in range(_LEGACY_PICKLES):
            first = _check(data)
            if number < 2 and first != (_LEGACY_MARK, _LEGACY_VERSION)[number]:
                raise Reason("it does not begin as torch.save's files do")
    except ValueError:
        if len(data.getbuffer()) > MOST_BYTES:
            raise Reason(f"its pickle has more than {MOST_BYTES:,} bytes") from None
        raise


class _Object:
    """A value on the stack; ``size`` counts the values and characters in it. Lists and dicts grow."""

    def __init__(self, size: int) -> None:
        self.size = size


def _check(data: BytesIO) -> object:
    """Check one pickle, from the position of ``data`` to its end; return the first value in it."""
    stack: list[_Object] = []
    marks: list[int] = []
    memo: dict[object, _Object] = {}
    work, first = 0, None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            first = argument if first is None and name != "PROTO" else first
            if name == "MARK":
                marks.append(len(stack))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
                work += stack[-1].size
            elif name != "PROTO":
                work += _follow(name, argument, stack, marks)
            work += 1
            if work > MOST_WORK:
                raise Reason("its pickle asks for too much work")
    except (IndexError, KeyError):  # the stack or the memo lacks a value that an instruction uses
        raise Reason("its pickle is broken") from None
    return first


def _follow(name: str, argument: Any, stack: list[_Object], marks: list[int]) -> int:
    """Do on ``stack`` what the instruction does to sizes; return the size that it hashes or copies."""
    if name not in _USES and name not in _ADDS:
        raise Reason(f"its pickle has the instruction {name}, which tensors do not need")
    if name == "GLOBAL" and not argument.startswith(("torch.", "torch ")) and argument not in _KNOWN:
        raise Reason(f"its pickle asks for {argument}, which tensors do not need")
    count = _USES.get(name, 0)
    start = marks.pop() if count is None else len(stack) - count
    if start < 0:
        raise IndexError
    size = sum(value.size for value in stack[start:])
    del stack[start:]
    if name in _FILLS:
        stack[-1].size += size
        return size
    made = _Object(1 + size + (len(argument) if isinstance(argument, (str, bytes)) else 0))
    stack.append(made)
    return made.size
