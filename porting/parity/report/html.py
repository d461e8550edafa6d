"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere.

``report.html`` next to this module is the page, which draws itself from a block of JSON. The JSON is that of
:func:`porting.parity.report.content.report_dict` and the feature maps::

    thumbnails  null, or {"dtype": "float32", "maps": {tap: [map, …]}}
        map         the scalars of Thumbnail, "height" and "width", and three strings of base64, one byte
                    per pixel, row by row: "ours", "reference", "difference". "reference" is null if it
                    equals "ours", "difference" if it is zero everywhere.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from importlib import resources
from typing import Any

import numpy as np

from porting.parity.report.content import Report, report_dict
from porting.parity.report.thumbnails import MIDDLE, Thumbnail, Thumbnails
from pytorch_model.files import replacing

_TEMPLATE = "report.html"
_SLOT = re.compile(r"\{\{(title|summary|data)\}\}")


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write ``report`` to ``path``, complete or not at all.

    About 14 kB per layer with thumbnails, 1 kB without. Raises :class:`OutputError` if it cannot be written.
    """
    text = render(report)
    with replacing(path) as temporary:
        # A badly decoded file name may hold lone surrogates, which UTF-8 has no bytes for.
        temporary.write_bytes(text.encode("utf-8", "replace"))


def render(report: Report) -> str:
    """The page. Names and texts of the report are escaped, so that they stay text."""
    document = {**report_dict(report), "thumbnails": _thumbnails(report.thumbnails)}
    verdict = {True: "passed", False: "failed", None: "measured, not judged"}[report.passed]
    layers = len(report.results[0].taps)
    values = {
        "title": html.escape(f"{report.config.name}: parity {verdict}"),
        "summary": html.escape(f"{report.config.name}: parity {verdict}, {layers} layers compared."),
        "data": _embeddable(document),
    }
    page = resources.files("porting.parity.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # One pass, so that a slot's name inside a value is not replaced.
    return _SLOT.sub(lambda slot: values[slot[1]], page)


def _embeddable(document: dict[str, Any]) -> str:
    """ASCII JSON that cannot end the script element around it or open a comment in it."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _thumbnails(thumbnails: Thumbnails | None) -> dict[str, Any] | None:
    if thumbnails is None:
        return None
    maps = {tap: [_map(thumbnail) for thumbnail in pair] for tap, pair in thumbnails.maps.items()}
    return {"dtype": thumbnails.dtype, "maps": maps}


def _map(thumbnail: Thumbnail) -> dict[str, Any]:
    same = np.array_equal(thumbnail.ours, thumbnail.reference)
    zero = bool((thumbnail.difference == MIDDLE).all())
    return {
        "why": thumbnail.why,
        "image": thumbnail.image,
        "channel": thumbnail.channel,
        "cell": thumbnail.cell,
        "lowest": thumbnail.lowest,
        "highest": thumbnail.highest,
        "largest": thumbnail.largest,
        "height": thumbnail.ours.shape[0],
        "width": thumbnail.ours.shape[1],
        "ours": _base64(thumbnail.ours),
        "reference": None if same else _base64(thumbnail.reference),
        "difference": None if zero else _base64(thumbnail.difference),
    }


def _base64(pixels: np.ndarray) -> str:
    return base64.b64encode(pixels.tobytes()).decode("ascii")
