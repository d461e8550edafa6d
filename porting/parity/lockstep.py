"""Run both networks side by side and compare every tap as it is produced.

PyTorch runs once on a doubled batch. The first half runs unchanged: its differences are *accumulated*. The
second half is set to the reference's activation at every tap, so that each module gets the reference's input:
its differences are *isolated*, and a fault shows in its own layer. Layers in evaluation mode never mix the
images of a batch, so the halves do not affect each other.

The reference runs in a thread that waits until each of its activations has been taken. So only a few are in
memory at once, however deep the network is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from porting.errors import CheckFailedError
from porting.parity.measure import Difference, difference, tolerances
from porting.rules import TapPair, taps
from pytorch_model.efficientdet import EfficientDet

#: Calls its argument with (tap name, NHWC array) at every tap, in execution order.
Reference = Callable[[Callable[[str, np.ndarray], None]], None]

#: Called with (pair, ours, reference's) at every tap: both [N, H, W, C], each network on its own activations.
Observer = Callable[[TapPair, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class TapResult:
    """One compared activation. ``shape`` is the reference's, [N, H, W, C].

    ``spans``: the number of taps whose layers the isolated figure covers. It is more than one if the
    reference does not show the activations before this one; rounding then adds up as it does from the image
    on.
    """

    pair: TapPair
    shape: tuple[int, ...]
    accumulated: Difference
    isolated: Difference
    dtype: str
    spans: int = 1

    @property
    def allowed(self) -> tuple[float, float]:
        """(accumulated, isolated) tolerance."""
        accumulated, isolated = tolerances(self.dtype)
        return accumulated, isolated if self.spans == 1 else accumulated

    @property
    def passed(self) -> bool:
        accumulated, isolated = self.allowed
        return self.accumulated.relative <= accumulated and self.isolated.relative <= isolated


@dataclass(frozen=True)
class ParityResult:
    """Every compared tap of one run, in execution order.

    ``absent``: the taps that the reference does not show. ``judged``: False if the reference's arithmetic is
    coarser than the tolerances of the float type, so that they prove nothing.
    """

    taps: tuple[TapResult, ...]
    dtype: str
    absent: tuple[str, ...] = ()
    judged: bool = True

    @property
    def passed(self) -> bool:
        return bool(self.taps) and all(tap.passed for tap in self.taps)

    @property
    def first_divergence(self) -> TapResult | None:
        """The earliest tap whose *isolated* error is out of tolerance, or else whose accumulated error is."""
        for tap in self.taps:
            if not tap.isolated.relative <= tap.allowed[1]:
                return tap
        return next((tap for tap in self.taps if not tap.passed), None)

    @property
    def divergence(self) -> str | None:
        """The first divergence in one line, with the names of both sides; None if there is none."""
        tap = self.first_divergence
        if tap is None:
            return None
        return (
            f"first divergence: {tap.pair.module} in PyTorch, {tap.pair.tap} in TensorFlow: "
            f"isolated {tap.isolated.relative:.1e}, accumulated {tap.accumulated.relative:.1e}"
        )

    def worst(self, figure: str) -> TapResult:
        """The tap with the largest ``accumulated`` or ``isolated`` relative difference."""
        return max(self.taps, key=lambda tap: getattr(tap, figure).relative)


def tensorflow_reference(
    variables: Mapping[str, np.ndarray], config: Any, images: np.ndarray, dtype: str
) -> Reference:
    """AutoML's network by :mod:`tf_reference` on ``images`` [N, H, W, 3]. Imports TensorFlow when run."""

    def run(emit: Callable[[str, np.ndarray], None]) -> None:
        from tf_reference.efficientdet import as_tensors, efficientdet

        def tap(name: str, x: Any) -> Any:
            emit(name, x.numpy())
            return x

        efficientdet(as_tensors(variables, dtype), config, np.asarray(images, dtype), tap)

    return run


def compare(
    model: EfficientDet,
    reference: Reference,
    images: np.ndarray,
    progress: Callable[[TapResult], None] = lambda result: None,
    observe: Observer | None = None,
    shown: Container[str] | None = None,
) -> ParityResult:
    """Compare ``model`` (in evaluation mode, on any device) with ``reference``, both on ``images``.

    ``images``: [N, H, W, 3], normalised; converted to the model's float type. ``progress`` is called with
    each result, ``observe`` with the two activations. ``shown``: the taps that the reference has, None for
    all. Errors of the reference are raised here.
    """
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    results: list[TapResult] = []
    absent: list[str] = []
    compared = 0  # taps up to the last compared one, absent ones included

    def visit(pair: TapPair, ours: torch.Tensor) -> torch.Tensor:
        nonlocal compared
        if shown is not None and pair.tap not in shown:
            absent.append(pair.tap)
            return ours
        expected = stream.take(pair.tap)
        count = len(expected)
        nhwc = ours.detach().permute(0, 2, 3, 1).cpu().numpy()
        result = TapResult(
            pair,
            expected.shape,
            difference(nhwc[:count], expected),
            difference(nhwc[count:], expected),
            dtype,
            len(results) + len(absent) + 1 - compared,
        )
        results.append(result)
        compared = len(results) + len(absent)
        progress(result)
        if observe:
            observe(pair, nhwc[:count], expected)
        if expected.shape != nhwc[count:].shape:
            return ours
        forced = torch.from_numpy(expected).to(ours).permute(0, 3, 1, 2)
        return torch.cat([ours[:count], forced])

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(parameter)
    with _Stream(reference) as stream, tapped(model, visit), tf32(False), torch.no_grad():
        model(torch.cat([x, x]))
    return ParityResult(tuple(results), dtype, tuple(absent))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether a GPU may round factors of float32 products to 10 bits, as PyTorch's convolutions do."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def tapped(model: EfficientDet, visit: Callable[[TapPair, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """In this context, ``visit`` gets every tapped activation [N, C, H, W] and returns its replacement."""
    by_module: dict[str, list[TapPair]] = {}
    for pair in taps(model.config):
        by_module.setdefault(pair.module, []).append(pair)

    def hook_for(pairs: list[TapPair]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return visit(pairs[0], output)
            for pair in pairs:
                assert pair.output is not None
                output[pair.output] = visit(pair, output[pair.output])
            return output

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_for(pairs)) for name, pairs in by_module.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _StoppedError(Exception):
    """Ends the reference's thread early, when its activations are no longer needed."""


class _Stream:
    """The reference in its own thread, from which one activation at a time is taken."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._queue: queue.Queue[tuple[str, np.ndarray] | BaseException | None] = queue.Queue(maxsize=1)
        self._early: dict[
            str, np.ndarray
        ] = {}  # the heads finish level by level here, but all at once in PyTorch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reference", daemon=True)

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _put(self, item: tuple[str, np.ndarray] | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise _StoppedError

    def _run(self) -> None:
        try:
            try:
                self._reference(lambda name, value: self._put((name, value)))
                self._put(None)
            except _StoppedError:
                raise
            except BaseException as error:
                self._put(error)
        except _StoppedError:
            pass

    def take(self, name: str) -> np.ndarray:
        """The reference's activation at tap ``name``. Raises CheckFailedError if there is none."""
        while name not in self._early:
            item = self._queue.get()
            if item is None:
                raise CheckFailedError(
                    f"porting/rules.py names the tap {name}, which the reference does not have; fix it there"
                )
            if isinstance(item, BaseException):
                raise item
            self._early[item[0]] = item[1]
        return self._early.pop(name)
