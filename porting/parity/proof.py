"""The proof of a conversion: run both networks, compare every layer, look for the cause of a failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from porting.convert import Conversion, apply_rules
from porting.parity.detections import DetectionCheck, compare_detections
from porting.parity.diagnosis.diagnose import Diagnosis, diagnose
from porting.parity.engines.proof import EngineResult
from porting.parity.inputs import at_most, seeded_images
from porting.parity.lockstep import Observer, ParityResult, TapResult, compare, tensorflow_reference
from porting.parity.precision import PrecisionCost
from porting.parity.reference.choose import FileReference, require_tensorflow
from porting.parity.report.content import engine_rows, precision_rows
from porting.rules import rules, taps
from pytorch_model.efficientdet import EfficientDet

#: A diagnosis keeps every activation and runs the network often, so its image is small. Pixels a side.
DIAGNOSIS_SIZE = 256

_WITNESSES = "only the original graph or config"


class Listener(Protocol):
    """Follows a proof while it runs."""

    def started(self, reference: str, image_size: tuple[int, int]) -> None:
        """The proof begins. ``reference``: its name, in words. ``image_size``: (height, width)."""

    def run_started(self, dtype: str, activations: int) -> None:
        """Both networks begin to run in ``dtype``; at most ``activations`` will be compared."""

    def compared(self, result: TapResult) -> None:
        """One activation of the current run was compared."""

    def diagnosing(self) -> None:
        """A run diverged; the search for the cause begins."""


class _Silence:
    def started(self, reference: str, image_size: tuple[int, int]) -> None: ...

    def run_started(self, dtype: str, activations: int) -> None: ...

    def compared(self, result: TapResult) -> None: ...

    def diagnosing(self) -> None: ...


@dataclass(frozen=True)
class Proof:
    """The outcome of :func:`prove`.

    ``results``: the rules and both networks in float64, then the weights as written, in float32; only the
    latter if the reference is a file. ``diagnosis``: the cause of the first divergence, None without one or
    if a small image does not show it. ``reference``: what the port was compared with, in words.
    ``image_size``: (height, width). ``detections``: of a reference that is a file with detections, compared
    with ours. ``precisions``: see :func:`porting.parity.precision.measure_precisions`. ``engines``: see
    :class:`porting.parity.engines.proof.EngineComparison`. ``assumed``: settings of the network that nobody
    states. ``is_original``: the reference is a file that holds the network.
    """

    results: tuple[ParityResult, ...]
    diagnosis: Diagnosis | None
    reference: str
    image_size: tuple[int, int]
    detections: DetectionCheck | None = None
    precisions: tuple[PrecisionCost, ...] = ()
    engines: tuple[EngineResult, ...] = ()
    assumed: tuple[str, ...] = ()
    is_original: bool = False

    @property
    def passed(self) -> bool | None:
        """As :attr:`port_passed`, and False if an engine failed."""
        return self.port_passed if all(engine.passed for engine in self.engines) else False

    @property
    def port_passed(self) -> bool | None:
        """Whether every judged run passed; None if the reference was too coarse to judge by."""
        judged = [result.passed for result in self.results if result.judged]
        if self.detections is not None:
            judged.append(self.detections.passed)
        return all(judged) if judged else None

    @property
    def about_assumed(self) -> str | None:
        """One sentence on ``assumed``; None if there is nothing to say."""
        return about_assumed(self.assumed, self.port_passed, self.reference if self.is_original else None)

    def figures(self) -> dict[str, Any]:
        """A summary that JSON can hold."""
        figures: dict[str, Any] = {
            "reference": self.reference,
            **{result.dtype: _figures(result) for result in self.results},
            "assumed": list(self.assumed),
            "about_assumed": self.about_assumed,
        }
        if self.detections is not None:
            figures["detections"] = {"passed": self.detections.passed, **vars(self.detections)}
        if self.precisions:
            figures["variants"] = precision_rows(self.precisions)
        if self.engines:
            figures["engines"] = engine_rows(self.engines)
        return figures


def about_assumed(assumed: Sequence[str], passed: bool | None, original: str | None) -> str | None:
    """What a verdict means for settings of the network that nobody states; None if it means nothing.

    ``assumed``: in words. ``passed``: the verdict. ``original``: the file of the network that was compared
    with; None for our own reference, which takes these settings from the same configuration.
    """
    settings = ", ".join(assumed)
    if not assumed or (original is None and not passed):
        return None
    if original is None:
        return f"proven for these assumed settings: {settings}; {_WITNESSES} can confirm them"
    if passed:
        return f"confirmed by {original}: {settings}"
    if passed is None:
        return f"still assumed, because this reference is too coarse to confirm them: {settings}"
    return f"these settings are assumed, and may be the cause: {settings}; --hparams sets them"


def prove(
    conversion: Conversion,
    images: np.ndarray,
    reference: FileReference | None = None,
    listener: Listener | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    raw_variables: Mapping[str, np.ndarray] | None = None,
    device: str | torch.device = "cpu",
    observe: Observer | None = None,
    assumed: Sequence[str] = (),
) -> Proof:
    """Compare a conversion with a TensorFlow reference, layer by layer.

    ``images``: float32 [N, H, W, 3], normalised. ``reference``: a file that holds the network, to compare
    with in float32 only; by default AutoML's network by :mod:`tf_reference`, in float64 and float32.
    ``state_dict``: the weights of the float32 run, by default the conversion's. ``raw_variables``: the
    checkpoint's values before averaging, which help a diagnosis. ``device``: where PyTorch runs. ``observe``
    sees every pair of float32 activations. ``assumed``: settings of the network that nobody states, in words
    (:attr:`Inference.unseen <porting.infer.Inference>`).

    Raises :class:`EfficientDetError` if TensorFlow is not installed, the weights do not fit the configuration
    or the file cannot be run.
    """
    require_tensorflow()
    listener = listener or _Silence()
    config, (height, width) = conversion.config, images.shape[1:3]
    name = reference.source if reference else "the TensorFlow reference"
    listener.started(name, (height, width))
    weights = conversion.state_dict if state_dict is None else state_dict
    model = EfficientDet.from_state_dict(weights, config).to(device)
    activations = sum(1 for _ in taps(config))
    results: tuple[ParityResult, ...]
    if reference is None:
        listener.run_started("float64", activations)
        exact = _run_float64(conversion, images, device, listener)
        listener.run_started("float32", activations)
        ops = tensorflow_reference(conversion.variables, config, images, "float32")
        results = (exact, compare(model, ops, images, listener.compared, observe))
    else:
        run = reference.on(images)
        listener.run_started("float32", activations)
        result = compare(model, run, images, listener.compared, observe, reference.taps)
        results = (dataclasses.replace(result, judged=reference.exact),)
    diagnosis = None
    for result in results:
        if result.judged and result.first_divergence and diagnosis is None:
            listener.diagnosing()
            diagnosis = _diagnose(conversion, weights, raw_variables, result)
    detections = compare_detections(reference.source, model) if reference and reference.exact else None
    return Proof(
        results,
        diagnosis,
        name,
        (height, width),
        detections,
        assumed=tuple(assumed),
        is_original=reference is not None,
    )


def _run_float64(
    conversion: Conversion, images: np.ndarray, device: str | torch.device, listener: Listener
) -> ParityResult:
    model = EfficientDet.from_state_dict(_exact_weights(conversion), conversion.config).to(device)
    reference = tensorflow_reference(conversion.variables, conversion.config, images, "float64")
    return compare(model, reference, images.astype(np.float64), listener.compared)


def _exact_weights(conversion: Conversion) -> dict[str, torch.Tensor]:
    return apply_rules(rules(conversion.config), conversion.variables, "float64")


def _diagnose(
    conversion: Conversion,
    weights: Mapping[str, torch.Tensor],
    raw_variables: Mapping[str, np.ndarray] | None,
    failed: ParityResult,
) -> Diagnosis | None:
    """Run again on a small image and diagnose the first divergence there; None if it does not show there."""
    config, dtype = conversion.config, failed.dtype
    model = EfficientDet.from_state_dict(
        _exact_weights(conversion) if dtype == "float64" else weights, config
    )
    images = seeded_images(config, at_most(config, DIAGNOSIS_SIZE)).astype(dtype)
    reference = tensorflow_reference(conversion.variables, config, images, dtype)
    first = compare(model, reference, images).first_divergence
    if first is None:
        return None
    return diagnose(model, conversion.variables, raw_variables, reference, images, first)


def _figures(result: ParityResult) -> dict[str, Any]:
    first = result.first_divergence
    return {
        "passed": result.passed if result.judged else None,
        "activations": len(result.taps),
        "absent": len(result.absent),
        "worst_accumulated": result.worst("accumulated").accumulated.relative,
        "worst_isolated": result.worst("isolated").isolated.relative,
        "first_divergence": first.pair.tap if first else None,
    }
