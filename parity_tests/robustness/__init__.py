"""Deliberate damage: damaged files for every reader, commands killed while they run."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def named(text: str | None, known: Iterable[str], what: str) -> list[str]:
    """The comma-separated names in ``text``, by default all. Exits with status 2 if one is unknown."""
    everything = list(known)
    names = text.split(",") if text else everything
    unknown = [name for name in names if name not in everything]
    if unknown:
        print(f"error: {unknown[0]} is not a {what}; known: {', '.join(everything)}", file=sys.stderr)
        sys.exit(2)
    return names
