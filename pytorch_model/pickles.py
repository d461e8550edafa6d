"""The pickle in a ``.pth``, looked through before PyTorch follows it.

``torch.load(weights_only=True)`` runs no code, but what it allows can still be told, in a hundred bytes, to
fill gigabytes (``bytearray``) or to hash one tuple for years. Here the instructions are read, and none is
followed.

Source: Python's ``pickletools``, whose descriptions of the instructions this goes by.
"""

from __future__ import annotations

import pickletools
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

from pytorch_model.errors import Reason

#: Of the pickle alone, tensors lie beside it. D7x's has 0.3 MB; reading takes seconds a megabyte.
MOST_BYTES = 1 << 21
#: Values in one tuple, those of tuples in it counted each time they are met, as hashing meets them.
MOST_VALUES = 10_000
#: Files of before PyTorch 1.6 begin with a mark, a version, facts of the system, the content, tensors' keys.
_LEGACY_PICKLES = 5

_MARK = pickletools.markobject


def check_pickles(path: Path) -> None:
    """Raise :class:`Reason` for a ``.pth`` whose pickle does what tensors do not need.

    Also raises OSError, and what pickletools and zipfile raise on damage.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            data = BytesIO(file.read(MOST_BYTES))
        for _ in range(_LEGACY_PICKLES):
            _check(data)
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise Reason(f"it has {len(names)} pickles")
        if archive.getinfo(names[0]).file_size > MOST_BYTES:
            raise Reason(f"its pickle has more than {MOST_BYTES:,} bytes")
        _check(BytesIO(archive.read(names[0])))


def _check(data: BytesIO) -> None:
    """One pickle, from where ``data`` stands to its end."""
    try:
        _follow(data)
    except (IndexError, KeyError, TypeError):  # of a stack or a memory that lacks what is asked of it
        raise Reason("its pickle is broken") from None


def _follow(data: BytesIO) -> None:
    """Keep the stack as unpickling would, of every object only how many values it stands for."""
    stack: list[int | None] = []  # None: a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if "GLOBAL" in name:
            _check_global(name, argument)
        if "PUT" in name or name == "MEMOIZE":
            memo[argument if isinstance(argument, int) else len(memo)] = stack[-1] or 0
            continue
        taken = _take(stack, opcode.stack_before)
        if name == "DUP":
            stack += [taken, taken]
        elif "GET" in name:
            stack.append(memo[int(argument or 0)])
        elif name == "MARK":
            stack.append(None)
        else:
            # What is hashed is a tuple, or made of one; a dict or list stands for itself, whatever is in it.
            holds = taken if name.startswith("TUPLE") or name == "REDUCE" else 0
            if holds > MOST_VALUES:
                raise Reason("a tuple in its pickle holds too many values")
            stack += [1 + holds] * len(opcode.stack_after)


def _take(stack: list[int | None], kinds: list[Any]) -> int:
    """Take what an instruction takes from the stack; how many values it stands for."""
    taken = 0
    if _MARK in kinds:
        while (top := stack.pop()) is not None:
            taken += top
        kinds = kinds[: kinds.index(_MARK)]
    for _ in kinds:
        taken += stack.pop() or 0
    return taken


def _check_global(instruction: str, argument: Any) -> None:
    module, _, name = str(argument).partition(" ")
    known = module.split(".")[0] == "torch" or (module, name) == ("collections", "OrderedDict")
    if instruction != "GLOBAL" or not known:
        raise Reason(f"its pickle asks for {argument or 'what a string names'}, which no tensor needs")
