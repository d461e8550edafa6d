"""The pickle in a ``.pth``, looked through before PyTorch follows it.

``torch.load(weights_only=True)`` runs no code, but what it allows can still be told, in a hundred bytes, to
fill gigabytes (``bytearray``) or to hash one tuple for years. Here the instructions are read, and none is
followed.

Source: Python's ``pickletools``, whose descriptions of the instructions this goes by; PyTorch's
``torch/serialization.py`` for which bytes of the file are the pickle.
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

import torch

from pytorch_model.errors import Reason, WeightsError, first_line
from pytorch_model.files import sha256_of_file
from pytorch_model.weights.checks import DIGEST

#: Of the pickle alone, tensors lie beside it. D7x's has 0.3 MB, with its averages and an optimizer's 0.9 MB.
MOST_BYTES = 2 << 20
#: Instructions, values and characters, counted each time they are met, as hashing and copying meet them.
#: D7x's come to 1.6 million, with averages and an optimizer's to some 6; reading so many takes seconds.
MOST_WORK = 12_000_000

#: torch.hub's convention: the name ends in the first digits of the file's SHA-256.
NAMED_BY_HASH = re.compile(r".*-([0-9a-f]{8,64})\.pth")

#: What :func:`check_pickles` raises for a file that must not be read.
_REJECTIONS = (
    *(Reason, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error),
)
_ZIP = b"PK\3\4"
#: Files of before PyTorch 1.6 begin with a mark, a version, facts of the system, the content, tensors' keys.
_LEGACY_MARK, _LEGACY_VERSION, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 1001, 5

#: What tensors, and what lies beside them in a training file, are made by; all of PyTorch's own is PyTorch's
#: to judge. ``bytearray`` is not among them: of a number it makes so many bytes.
_KNOWN = frozenset(
    (
        *("collections OrderedDict", "collections Counter", "_codecs encode"),
        *("builtins set", "builtins complex", "__builtin__ set", "__builtin__ complex"),
    )
)
_MARK = pickletools.markobject
#: Instructions that put into an object on the stack; they leave it there.
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


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
                f"{path} unpacks to more than its size, which torch.save never writes; fetch it again"
            )
    try:
        check_pickles(path)
    except _REJECTIONS as error:
        raise _not_tensors(path, first_line(error)) from None
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
            "fetch it again, or, if you chose these eight digits for something else, rename it"
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
    """Raise :class:`Reason` for a ``.pth`` whose pickle does what tensors do not need.

    Also raises OSError, and what pickletools and zipfile raise on damage.
    """
    with path.open("rb") as file:
        head = file.read(MOST_BYTES + 1)
    if head.startswith(_ZIP):
        _check(_zipped(path))
        return
    if zipfile.is_zipfile(path):  # at its end, where PyTorch does not look
        raise Reason("it is an archive behind something else")
    _check_legacy(BytesIO(head))


def _zipped(path: Path) -> BytesIO:
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename.lower() for entry in archive.infolist()]  # PyTorch's reader tells no case
        pickles = [entry for entry in archive.infolist() if entry.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise Reason(f"it has {len(pickles)} pickles, or a name twice")
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


def _check(data: BytesIO) -> object:
    """One pickle, from where ``data`` stands to its end; the first value in it."""
    try:
        return _follow(data)
    except (
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # of a stack or a memory that lacks what is asked
        raise Reason("its pickle is broken") from None


class _Object:
    """Something on the stack: how much it holds. Lists and dicts grow where they stand."""

    def __init__(self, holds: int) -> None:
        self.holds = holds


def _follow(data: BytesIO) -> object:
    """Keep the stack as unpickling would, of every object only how much it holds."""
    stack: list[_Object | None] = []  # None: a mark
    memo: dict[int, _Object | None] = {}
    work, first = 0, None
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        first = argument if first is None and name != "PROTO" else first
        if "GLOBAL" in name:
            _check_global(name, argument)
        if "PUT" in name or name == "MEMOIZE":
            memo[argument if isinstance(argument, int) else len(memo)] = stack[-1]
            work += 1
            continue
        taken = _take(stack, opcode.stack_before)
        if name in _FILLING:
            added = sum(each.holds for each in taken[1:])
            taken[0].holds += added
            stack.append(taken[0])
            work += 1 + added
        else:
            made = _made(name, argument, taken, memo, len(opcode.stack_after))
            stack += made
            work += 1 + sum(each.holds for each in made if each)
        if work > MOST_WORK:
            raise Reason("its pickle asks for too much work")
    return first


def _made(
    name: str, argument: Any, taken: list[_Object], memo: dict[int, _Object | None], count: int
) -> list[_Object | None]:
    """What an instruction that fills nothing puts on the stack."""
    if name == "MARK":
        return [None]
    if name == "DUP":
        return [taken[0], taken[0]]
    if "GET" in name:
        return [memo[int(argument or 0)]]
    holds = 1 + sum(each.holds for each in taken)
    return [_Object(holds + (len(argument) if isinstance(argument, (str, bytes)) else 0))] * count


def _take(stack: list[_Object | None], kinds: list[Any]) -> list[_Object]:
    """Take what an instruction takes from the stack, the lowest first."""
    taken: list[_Object] = []
    if _MARK in kinds:
        while (top := stack.pop()) is not None:
            taken.append(top)
        kinds = kinds[: kinds.index(_MARK)]
    for _ in kinds:
        top = stack.pop()
        if top is None:
            raise IndexError
        taken.append(top)
    return taken[::-1]


def _check_global(instruction: str, argument: Any) -> None:
    known = str(argument).startswith(("torch.", "torch ")) or argument in _KNOWN
    if instruction != "GLOBAL" or not known:
        raise Reason(f"its pickle asks for {argument or 'what a string names'}, which no tensor needs")
