"""The report of a proof: the same content for a verification and for a release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porting.convert import Conversion
from porting.parity.proof import Proof
from porting.parity.report.content import Report, write_json
from porting.parity.report.html import write_html
from porting.parity.report.thumbnails import Thumbnails
from porting.parity.weight_comparison import WeightComparison


def build_report(
    proof: Proof,
    conversion: Conversion,
    *,
    origin: Mapping[str, Any],
    environment: Mapping[str, Any],
    image: Path | None = None,
    comparison: WeightComparison | None = None,
    thumbnails: Thumbnails | None = None,
) -> Report:
    """What a report says about a proof.

    ``origin``: facts about the checkpoint and the weights, shown first. ``environment``: facts about the
    machine and its software, shown last. ``image``: the file that the networks ran on, None for a seeded
    image. ``comparison``: of the weights with the conversion, if they were read from a file. ``thumbnails``:
    the observer of the float32 run.
    """
    diagnosis, not_the_port = None, comparison is not None and not comparison.same_function
    if proof.diagnosis:
        found = proof.diagnosis
        diagnosis = f"{found.module} ({found.tap}): {found.kind}: {found.detail}"
    elif comparison and not_the_port:
        diagnosis = comparison.explanation
    height, width = proof.image_size
    return Report(
        results=proof.results,
        config=conversion.config,
        metadata={
            **origin,
            "values": conversion.values_kind,
            "variables_sha256": conversion.digest,
            "picture": f"{height}×{width}, {image or 'seeded'}",
            **environment,
        },
        diagnosis=diagnosis,
        thumbnails=thumbnails,
        precisions=proof.precisions,
        engines=proof.engines,
        not_the_port=not_the_port,
        about_assumed=proof.about_assumed,
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` to ``folder``; returns the latter's path.

    Raises :class:`OutputError` if the files cannot be written.
    """
    write_json(report, folder / "report.json")
    page = folder / "report.html"
    write_html(report, page)
    return page
