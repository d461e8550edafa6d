"""The selection on the CPU finds the pairs that the selection in tensors finds, in their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytorch_model.detection.suppression import candidates, host_pairs

ANCHORS, CLASSES = 3, 5


def in_tensors(levels: list[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(candidates, "on_host", lambda tensor: False)
        return candidates._top_pairs(levels, ANCHORS, CLASSES, count)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    sides=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    images=st.integers(1, 2),
    different=st.sampled_from([1, 2, 7, 1000]),
    count=st.integers(1, 400),
    sample=st.sampled_from([4, 30, 1 << 16]),
    channels_last=st.booleans(),
    special=st.sampled_from([None, float("inf"), float("-inf"), -0.0]),
)
def test_the_same_pairs(
    seed: int,
    sides: list[tuple[int, int]],
    images: int,
    different: int,
    count: int,
    sample: int,
    channels_last: bool,
    special: float | None,
) -> None:
    """Few ``different`` values make many ties; a small ``sample`` misjudges where the last pair is."""
    rng = np.random.default_rng(seed)
    levels = []
    for height, width in sides:
        values = rng.integers(-different, different, (images, ANCHORS * CLASSES, height, width)) / 8
        if special is not None:
            values[rng.random(values.shape) < 0.2] = special
        level = torch.from_numpy(values.astype(np.float32))
        levels.append(level.contiguous(memory_format=torch.channels_last) if channels_last else level)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host_pairs, "_SAMPLE", sample)
        found = host_pairs.top_pairs_on_host(levels, ANCHORS, CLASSES, count)
    assert found is not None
    for ours, expected in zip(found, in_tensors(levels, count), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("place", [0, 37, -1])
def test_nan_is_left_to_the_tensors(place: int) -> None:
    level = torch.zeros(1, ANCHORS * CLASSES, 4, 4)
    level.view(-1)[place] = float("nan")
    assert host_pairs.top_pairs_on_host([level], ANCHORS, CLASSES, 10) is None
