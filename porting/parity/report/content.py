"""The results of a proof as one JSON document, for programs to read and for the HTML report to draw.

Schema, version 1. Figures are relative L2 differences and largest absolute ones (:class:`Difference`). JSON
has no infinity and no NaN: such a figure is the string ``"Infinity"``, ``"-Infinity"`` or ``"NaN"``, which
JavaScript's ``Number`` and Python's ``float`` both read back. ::

    schema      1
    passed      bool: every run passed; null if none was judged
    model       the configuration: EfficientDetConfig.to_dict(), plus "levels" [min … max]
    metadata    the caller's own facts about checkpoint and run, unchanged
    diagnosis   str or null: the cause, if it is known
    about_assumed  str or null: what the verdict means for settings that are assumed
    runs        one object per run, in the caller's order:
        dtype             "float64"
        passed            bool
        judged            bool: false if the reference is too coarse for the tolerances
        activations       int: compared taps
        absent            taps that the reference does not show
        tolerances        {"accumulated": number, "isolated": number}
        worst             {"accumulated": {"layer": index, "relative": number}, "isolated": {…}};
                          each null without layers
        first_divergence  index of a layer, or null
    layers      one object per compared activation, in execution order:
        module, tap, output   the pair: PyTorch module, TensorFlow scope, level index or null
        shape                 [N, H, W, C] of the reference
        passed                bool: in every run
        runs                  dtype → {"passed": bool, "accumulated": {"relative", "maximum"},
                              "isolated": {…}}
    variants    the same weights run in other ways, against the network in float64:
        name                       "bfloat16"
        classes, boxes             {"relative", "maximum"} of the head's outputs, all levels together, or null
        score                      largest change of a class score, 0…1, or null
        skipped                    why it was not run, or null
    engines     each against the eager network and the TensorFlow reference, on the same image:
        name         "onnxruntime"
        passed       bool
        failure      why it computed nothing, or null
        tolerances   {"eager", "times_eager_rounding", "reference"}: of relative L2
        outputs      one object per head output and level:
            tap                  "class_outputs/3"
            passed               bool
            eager, reference     {"relative", "maximum"}; the latter null if the reference does not show it
            exact, eager_exact   differences of the engine and the eager network to float64, or null
        detections, reference_detections
                     null, or the fields of Agreement and "passed"; only the former is judged
    histograms  null, or of one run's output taps:
        dtype        "float32"
        log10_edges  edges of the bins, log10 of |ours − reference|; one more than there are counts
        taps         tap → {"counts": [int], "equal": int, "not_finite": int}; values beyond the edges are
                     in the first and last count, values without any difference in "equal"
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from porting.parity.engines.agreement import Agreement
from porting.parity.engines.proof import ENGINE_TOLERANCE, ROUNDING_TIMES, EngineResult
from porting.parity.lockstep import ParityResult, TapResult
from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE, Difference, tolerances
from porting.parity.precision import PrecisionCost
from porting.parity.report.thumbnails import Thumbnails, bin_edges
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import replacing

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The content of a report.

    ``results``: one or more runs of the same network on the same image, each in a different float type.
    ``metadata``: str → anything JSON can hold, also NumPy scalars and paths; shown in this order.
    ``diagnosis``: the cause of a failure, in words. ``thumbnails``: the observer of one run. ``precisions``:
    the same weights run in other ways. ``engines``: what else computes them, compared with the eager network.
    ``not_the_port``: compared tensor by tensor, the weights of the runs are not the port, even if all layers
    passed. ``about_assumed``: a sentence on assumed settings.

    Raises ``ValueError`` if the runs do not belong together.
    """

    config: EfficientDetConfig
    results: tuple[ParityResult, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: str | None = None
    thumbnails: Thumbnails | None = None
    precisions: tuple[PrecisionCost, ...] = ()
    engines: tuple[EngineResult, ...] = ()
    not_the_port: bool = False
    about_assumed: str | None = None

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a report needs at least one run")
        if len({result.dtype for result in self.results}) != len(self.results):
            raise ValueError("a report cannot have two runs of one float type")
        pairs = [tap.pair for tap in self.results[0].taps]
        if any([tap.pair for tap in result.taps] != pairs for result in self.results):
            raise ValueError("the runs compared different layers")

    @property
    def passed(self) -> bool | None:
        """Whether every judged run and engine passed, with the right weights; None if no run was judged."""
        if self.not_the_port or not all(engine.passed for engine in self.engines):
            return False
        judged = [result.passed for result in self.results if result.judged]
        return all(judged) if judged else None


def report_dict(report: Report) -> dict[str, Any]:
    """The document described above: dicts, lists, str, int, bool, None and finite floats only.

    Raises ``TypeError`` on metadata JSON cannot hold.
    """
    config = report.config
    document = {
        "schema": SCHEMA,
        "passed": report.passed,
        "model": {**config.to_dict(), "levels": [config.min_level, config.max_level]},
        "metadata": report.metadata,
        "diagnosis": report.diagnosis,
        "about_assumed": report.about_assumed,
        "runs": [_run(result) for result in report.results],
        "layers": [
            _layer({result.dtype: tap for result, tap in zip(report.results, taps, strict=True)})
            for taps in zip(*(result.taps for result in report.results), strict=True)
        ],
        "variants": precision_rows(report.precisions),
        "engines": engine_rows(report.engines),
        "histograms": _histograms(report.thumbnails),
    }
    plain: dict[str, Any] = _plain(document)
    return plain


def write_json(report: Report, path: str | os.PathLike[str]) -> None:
    """Write :func:`report_dict` to ``path``, indented, complete or not at all.

    Raises :class:`OutputError` if it cannot be written.
    """
    text = json.dumps(report_dict(report), indent=1, allow_nan=False)
    with replacing(path) as temporary:
        Path(temporary).write_text(text + "\n", encoding="ascii")


def _run(result: ParityResult) -> dict[str, Any]:
    accumulated, isolated = tolerances(result.dtype)
    first = result.first_divergence
    return {
        "dtype": result.dtype,
        "passed": result.passed,
        "judged": result.judged,
        "activations": len(result.taps),
        "absent": result.absent,
        "tolerances": {"accumulated": accumulated, "isolated": isolated},
        "worst": {figure: _worst(result, figure) for figure in ("accumulated", "isolated")},
        "first_divergence": None if first is None else result.taps.index(first),
    }


def _worst(result: ParityResult, figure: str) -> dict[str, Any] | None:
    if not result.taps:
        return None
    tap = result.worst(figure)
    return {"layer": result.taps.index(tap), "relative": getattr(tap, figure).relative}


def _layer(by_dtype: Mapping[str, TapResult]) -> dict[str, Any]:
    tap = next(iter(by_dtype.values()))
    return {
        "module": tap.pair.module,
        "tap": tap.pair.tap,
        "output": tap.pair.output,
        "shape": tap.shape,
        "passed": all(tap.passed for tap in by_dtype.values()),
        "runs": {
            dtype: {
                "passed": tap.passed,
                "accumulated": _difference(tap.accumulated),
                "isolated": _difference(tap.isolated),
            }
            for dtype, tap in by_dtype.items()
        },
    }


def precision_rows(costs: Iterable[PrecisionCost]) -> list[dict[str, Any]]:
    """``variants`` of the document, infinities as strings."""
    rows = [
        {
            "name": cost.name,
            "classes": cost.classes and _difference(cost.classes),
            "boxes": cost.boxes and _difference(cost.boxes),
            "score": cost.score,
            "skipped": cost.skipped,
        }
        for cost in costs
    ]
    plain: list[dict[str, Any]] = _plain(rows)
    return plain


def engine_rows(engines: Iterable[EngineResult]) -> list[dict[str, Any]]:
    """``engines`` of the document, infinities as strings."""
    rows = [
        {
            "name": engine.name,
            "passed": engine.passed,
            "failure": engine.failure,
            "tolerances": {
                "eager": ENGINE_TOLERANCE,
                "times_eager_rounding": ROUNDING_TIMES,
                "reference": FLOAT32_ACCUMULATED_TOLERANCE,
            },
            "outputs": [
                {
                    "tap": output.tap,
                    "passed": output.passed,
                    "eager": _difference(output.eager),
                    "reference": output.reference and _difference(output.reference),
                    "exact": output.exact and _difference(output.exact),
                    "eager_exact": output.eager_exact and _difference(output.eager_exact),
                }
                for output in engine.outputs
            ],
            "detections": _agreement(engine.detections),
            "reference_detections": _agreement(engine.reference_detections),
        }
        for engine in engines
    ]
    plain: list[dict[str, Any]] = _plain(rows)
    return plain


def _agreement(found: Agreement | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "passed": found.passed}


def _difference(difference: Difference) -> dict[str, float]:
    return {"relative": difference.relative, "maximum": difference.maximum}


def _histograms(thumbnails: Thumbnails | None) -> dict[str, Any] | None:
    if thumbnails is None or not thumbnails.histograms:
        return None
    return {
        "dtype": thumbnails.dtype,
        "log10_edges": bin_edges(),
        "taps": {
            tap: {
                "counts": histogram.counts.tolist(),
                "equal": histogram.equal,
                "not_finite": histogram.not_finite,
            }
            for tap, histogram in thumbnails.histograms.items()
        },
    }


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types; NaN and infinity become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"a report cannot hold a {type(value).__name__}: {value!r}")
