"""The model zoo: every released checkpoint, its figures, and which parts of it were verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from porting.audit import PUBLISHED, audit_parameters, multiply_adds
from porting.sources.google_releases import GOOGLE_RELEASES, GoogleRelease
from pytorch_model.config import model_config

BEGIN = "<!-- begin: python tools/audit.py --markdown -->"
END = "<!-- end -->"

#: The status of a release of which no file was available: the network is proven on seeded values.
SYNTHETIC = "synthetic values only"

#: Release → its status, if more than :data:`SYNTHETIC` was verified. An index lists names and shapes only.
EVIDENCE: Mapping[str, str] = {
    "efficientdet-d0": "names, shapes: a released index of this val AP; " + SYNTHETIC,
    "efficientdet-d1": "names, shapes: a released index of this val AP; " + SYNTHETIC,
    "efficientdet-d2": "names, shapes: a released index of this val AP; " + SYNTHETIC,
    "efficientdet-d3": "names, shapes: another release's index (val AP 47.2); " + SYNTHETIC,
    "efficientdet-d4": "names, shapes: another release's index (val AP 49.0); " + SYNTHETIC,
    "efficientdet-lite0": "real values out of the public int8 TFLite file: AP 31.59 on 158 val images; "
    "the release itself was not run",
}


@dataclass(frozen=True)
class Row:
    """One release. Parameters are counts, multiply-adds of one image of ``image_size`` (height, width)."""

    release: GoogleRelease
    image_size: tuple[int, int]
    ours: int
    automl: int
    published: str
    multiply_adds: int
    status: str


def rows() -> Iterator[Row]:
    """Every release, in the order of AutoML's pages."""
    for release in GOOGLE_RELEASES.values():
        config = model_config(release.model)
        size = (640, 640) if release.name.endswith("-640") else config.image_size
        parameters = audit_parameters(config)
        yield Row(
            release,
            size,
            parameters.ours,
            parameters.automl,
            PUBLISHED[release.model].parameters,
            sum(multiply_adds(config, size).values()),
            EVIDENCE.get(release.name, SYNTHETIC),
        )


def markdown() -> str:
    """The table of the README, between :data:`BEGIN` and :data:`END`."""
    lines = [
        BEGIN,
        "| release | image | parameters, bias-free | in AutoML | published | multiply-adds | AP val "
        "| AP test-dev | status |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        cells = (
            row.release.name,
            f"{row.image_size[0]}",
            f"{row.ours:,}",
            f"{row.automl:,}",
            f"{row.published}M",
            f"{row.multiply_adds / 1e9:.2f}B",
            _ap(row.release.ap_val),
            _ap(row.release.ap_test_dev),
            row.status,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def _ap(value: float | None) -> str:
    return "–" if value is None else str(value)
