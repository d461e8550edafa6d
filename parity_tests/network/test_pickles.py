"""Pickles that would make PyTorch work or fill memory without end are rejected; those of tensors pass."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytorch_model import WeightsError
from pytorch_model.errors import Reason
from pytorch_model.weights.files import read_weights
from pytorch_model.weights.pickles import MOST_BYTES, check_pickles

MANY = b"\x8a\x08" + struct.pack("<q", 5_000_000_000)
# (1,) is memo entry 0; a tuple of entry n is entry n + 1. The last is used as a key, so it is hashed.
PAIRS = b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40))
# The same with each tuple twice in the next: the last holds 2**40 values.
DOUBLED = b"K\x01\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(40))
FOREVER = {
    "a key of endless tuples": (b"\x80\x02}(" + PAIRS + b"K\x01u.", "its pickle asks for too much work"),
    "by doubling": (b"\x80\x02}" + DOUBLED + b"K\x01s.", "its pickle asks for too much work"),
    "a message that shows endless tuples": (
        b"\x80\x02" + DOUBLED + b")R.",
        "its pickle asks for too much work",
    ),
    "an instruction that PyTorch does not follow": (
        b"\x80\x02K\x012\x86.",
        "its pickle has the instruction DUP, which tensors do not need",
    ),
    "bytes": (
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n" + MANY + b"\x85Rs.",
        "its pickle asks for builtins bytearray, which tensors do not need",
    ),
    "sets of one long list": (
        b"\x80\x02](" + b"K\x01" * 30_000 + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R" * 10_000 + b".",
        "its pickle asks for too much work",
    ),
    "copies of one long text": (
        b"\x80\x02X\x00\x00\x08\x00" + b"a" * (1 << 19) + b"q\x00"
        b"X\x06\x00\x00\x00latin1q\x01" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 1_000 + b".",
        "its pickle asks for too much work",
    ),
    "a list in itself": (b"\x80\x02]q\x00" + b"h\x00h\x00a" * 60 + b".", "its pickle asks for too much work"),
    "a name from the stack": (
        b"\x80\x04X\x05\x00\x00\x00torchX\x04\x00\x00\x00Size\x93.",
        "has the instruction STACK_GLOBAL, which tensors do not need",
    ),
    "a module like torch": (b"\x80\x02ctorchvision\nx\n.", "asks for torchvision x"),
    "nothing on the stack": (b"\x80\x02\x85.", "its pickle is broken"),
    "nothing in the memory": (b"\x80\x02h\x07.", "its pickle is broken"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
}


def with_pickle(path: Path, data: bytes, times: int = 1) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(times):
            archive.writestr(f"w{number or ''}/data.pkl", data)
        archive.writestr("w/version", b"3\n")
        archive.writestr("w/padding", bytes(len(data)))
    return path


@pytest.mark.parametrize("name", FOREVER)
def test_pickles_that_do_more_than_tensors_need_are_rejected(name: str, tmp_path: Path) -> None:
    data, message = FOREVER[name]
    with pytest.raises(WeightsError, match=f"{message}.*nothing in it was run"):
        read_weights(with_pickle(tmp_path / "w.pth", data))


def test_the_format_before_pytorch_1_6_is_checked_too(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    check_pickles(tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    file = io.BytesIO(data)
    for _ in range(3):  # the pickles before the content
        list(pickletools.genops(file))
    (tmp_path / "w.pth").write_bytes(data[: file.tell()] + FOREVER["by doubling"][0] + data)
    with pytest.raises(WeightsError, match="its pickle asks for too much work"):
        read_weights(tmp_path / "w.pth")


def test_long_and_doubled_pickles_are_rejected(tmp_path: Path) -> None:
    plain = pickle.dumps({}, 2)
    with pytest.raises(Reason, match="it has 2 pickles, or the same name twice"):
        check_pickles(with_pickle(tmp_path / "w.pth", plain, times=2))
    long = plain[:-1] + b"N" * MOST_BYTES + b"."
    for path in (with_pickle(tmp_path / "w.pth", long), legacy(tmp_path / "old.pth", long, *BEGIN)):
        with pytest.raises(Reason, match=re.escape(f"its pickle has more than {MOST_BYTES:,} bytes")):
            check_pickles(path)


def legacy(path: Path, content: bytes, *starts: int) -> Path:
    """``content`` as PyTorch before 1.6 wrote it."""
    begin = b"".join(pickle.dumps(start, 2) for start in starts) + pickle.dumps({"little_endian": True}, 2)
    path.write_bytes(begin + content + pickle.dumps([], 2))
    return path


BEGIN = (0x1950A86A20F9469CFC6C, 1001)


def test_the_checked_pickle_is_the_one_pytorch_follows(tmp_path: Path) -> None:
    """Files with two pickles: a harmless one for the check, a harmful one for PyTorch."""
    forever, _ = FOREVER["by doubling"]
    both = legacy(tmp_path / "both.pth", forever, *BEGIN)
    good = with_pickle(tmp_path / "good.pth", pickle.dumps({}, 2)).read_bytes()
    both.write_bytes(both.read_bytes() + good)
    with pytest.raises(WeightsError, match="it is an archive behind something else"):
        read_weights(both)
    for names in (("w/data.pkl", "w/DATA.PKL"), ("w/DATA.PKL", "w/data.pkl")):
        with zipfile.ZipFile(tmp_path / "twin.pth", "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps({}, 2) if name.islower() else forever)
            archive.writestr("w/padding", bytes(1000))
        with pytest.raises(WeightsError, match="it has 2 pickles, or the same name twice"):
            read_weights(tmp_path / "twin.pth")
    plain = pickle.dumps({"x": 1}, 2)
    check_pickles(legacy(tmp_path / "old.pth", plain, *BEGIN))
    for starts in ((BEGIN[0], 1000), (1, BEGIN[1])):
        with pytest.raises(Reason, match=r"it does not begin as torch\.save's files do"):
            check_pickles(legacy(tmp_path / "old.pth", plain, *starts))


def test_pickles_of_tensors_pass(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])  # keeps a Counter
    contents: dict[str, Any] = {
        "state dict": model.state_dict(),
        "training": {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "best": None,
        },
        "parameters": dict(model.named_parameters()),
        "schedule": schedule.state_dict(),
        "other types": {
            "a": torch.ones(3).to_sparse(),
            "b": torch.ones(2, dtype=torch.bfloat16),
            "c": torch.Size([1]),
        },
        "many in a tuple": tuple(range(20_000)),
        "many losses": [0.5 + n for n in range(100_000)],
        "set, bytes, complex": {"a": {1, 2}, "b": b"xyz", "c": 1j},
        "an ordered dict": collections.OrderedDict((str(i), i) for i in range(30_000)),
    }
    for zipped in (True, False):
        for content in contents.values():
            torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
            check_pickles(tmp_path / "w.pth")
            torch.load(tmp_path / "w.pth", weights_only=True)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(PLAIN, st.integers(0, 3), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3))
def test_any_pickle_passes_or_is_rejected(
    tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(pickle.dumps(value, protocol))
    for place, byte in damage:
        data[place % len(data)] = byte
    path = with_pickle(tmp_path_factory.getbasetemp() / "any.pth", bytes(data))
    try:
        check_pickles(path)
    except (Reason, ValueError):  # ValueError comes from pickletools
        assert damage or protocol != 2  # PyTorch writes protocol 2, and follows only its instructions


def test_pytorch_itself_rejects_its_own_functions(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "w.pth", b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00xtR.")
    check_pickles(path)
    message = "its pickle holds more than tensors, such as code.*nothing in it was run"
    with pytest.raises(WeightsError, match=message):
        read_weights(path)
