"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere.

``report.html`` beside this module holds the page and draws it from a block of JSON, which is put in here:
:func:`porting.parity.report.content.report_dict` plus the small pictures::

    thumbnails  null, or {"dtype": "float32", "maps": {tap: [picture, …]}}
        picture     the scalars of Thumbnail, "height" and "width", and three strings of base64, a byte a
                    pixel, row by row: "ours", "reference", "difference". "reference" is null where it
                    equals "ours", "difference" where it is zero everywhere.
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

    Some 14 kB a layer with thumbnails, 1 kB without. Raises :class:`OutputError` where the disk refuses.
    """
    text = render(report)
    with replacing(path) as temporary:
        # A badly decoded file name may hold lone surrogates, which UTF-8 has no bytes for.
        temporary.write_bytes(text.encode("utf-8", "replace"))


def render(report: Report) -> str:
    """The page. Whatever the report's names and texts hold stays text."""
    document = {**report_dict(report), "thumbnails": _thumbnails(report.thumbnails)}
    verdict = {True: "passed", False: "failed", None: "measured, not judged"}[report.passed]
    layers = len(report.results[0].taps)
    values = {
        "title": html.escape(f"{report.config.name}: parity {verdict}"),
        "summary": html.escape(f"{report.config.name}: parity {verdict}, {layers} layers compared."),
        "data": _embeddable(document),
    }
    page = resources.files("porting.parity.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # One pass, so that a slot's name inside a value is left alone.
    return _SLOT.sub(lambda slot: values[slot[1]], page)


def _embeddable(document: dict[str, Any]) -> str:
    """ASCII JSON that cannot end the script element around it or open a comment in it."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _thumbnails(thumbnails: Thumbnails | None) -> dict[str, Any] | None:
    if thumbnails is None:
        return None
    maps = {tap: [_picture(picture) for picture in pictures] for tap, pictures in thumbnails.maps.items()}
    return {"dtype": thumbnails.dtype, "maps": maps}


def _picture(picture: Thumbnail) -> dict[str, Any]:
    same = np.array_equal(picture.ours, picture.reference)
    zero = bool((picture.difference == MIDDLE).all())
    return {
        "why": picture.why,
        "image": picture.image,
        "channel": picture.channel,
        "cell": picture.cell,
        "lowest": picture.lowest,
        "highest": picture.highest,
        "largest": picture.largest,
        "height": picture.ours.shape[0],
        "width": picture.ours.shape[1],
        "ours": _base64(picture.ours),
        "reference": None if same else _base64(picture.reference),
        "difference": None if zero else _base64(picture.difference),
    }


def _base64(pixels: np.ndarray) -> str:
    return base64.b64encode(pixels.tobytes()).decode("ascii")
