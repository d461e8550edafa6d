"""Damage done on purpose: mutated files for every reader, commands killed in the middle."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def named(text: str | None, known: Iterable[str], what: str) -> list[str]:
    """The names in ``text``, comma-separated, by default all. Exits with status 2 on an unknown one."""
    everything = list(known)
    names = text.split(",") if text else everything
    unknown = [name for name in names if name not in everything]
    if unknown:
        print(f"error: no {what} is called {unknown[0]}; known: {', '.join(everything)}", file=sys.stderr)
        sys.exit(2)
    return names
