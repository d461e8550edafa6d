"""JSON as people bring it, read so that nothing in it is lost without a word."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from porting.errors import Reason


def parse_json(data: bytes | str) -> Any:
    """What ``data`` holds. Bytes may be UTF-8, UTF-16 or UTF-32, with a byte-order mark or without.

    Raises :class:`Reason`, also for what Python's reader takes: an object with two values for one key.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Reason(f"it is not JSON: byte {error.start} is no text") from None
    except json.JSONDecodeError as error:
        raise Reason(f"it is not JSON: {error}") from None
    except RecursionError:
        raise Reason("it is nested too deep") from None
    except ValueError:  # Python's advice is for programmers
        raise Reason("it holds a number of thousands of digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Reason(f"an object in it has the key {key[:40]!r} twice")
    return found
