"""Label files of every form → id → name, as the file states them.

The forms: one name per line; lines ``id: name``, ``id name``, ``id,name`` or ``name,id``; JSON and YAML, a
list or ``{id: name}``, also below a key such as ``names`` or AutoML's ``label_map``; COCO annotations; the
Object Detection API's ``label_map.pbtxt``.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytorch_model.errors import Reason
from pytorch_model.files import parse_json
from pytorch_model.formats.protobuf_text import parse_message, unescaped
from pytorch_model.labels.known import COCO_NAMES, canonical, is_hole

FORMS = (
    "give one name per line, lines `id: name`, JSON or YAML (a list, {id: name}), COCO annotations, or a "
    "label_map.pbtxt"
)
YAML_SUFFIXES = (".yaml", ".yml")

#: Bytes of a label file that is neither JSON nor YAML. LVIS's 1,203 names have 20 kB.
_MOST_TEXT = 16 << 20
_MOST_YAML = 1 << 20
_MOST_NAME = 1_000  # characters, as in EfficientDetConfig

#: A possible class id. int() would raise on thousands of digits, and read "1_0" as ten.
_ID = re.compile(r"[0-9]{1,9}")
_PBTXT = re.compile(r"^[ \t]*item(?:\s*:)?\s*[{<]", re.M)  # blocks "item { id: 1 name: 'x' }"
_KEYS = ("label_map", "label_id_mapping", "names", "obj_list")  # of AutoML, of Darknet's heirs, of zylo117's
_YAML = re.compile(rf"^(?:{'|'.join(_KEYS)}|num_classes|nc)[ \t]*:", re.M)
_ID_FIRST = re.compile(r"""["']?(?P<id>[0-9]{1,9})["']?(?:\s*[,;=]\s*|[.)]\s+|\s+)(?P<name>\S.*)""")
_ID_LAST = re.compile(r"""(?P<name>.*\S) *[,;:\t]\s*["']?(?P<id>[0-9]{1,9})["']?""")
_HEADER = re.compile(r"\W*((class|category|label|name|id|index|idx)(\W+|_|$)){2,}", re.I)


class Names(dict[int, str]):
    """Id → name, as a file states them.

    ``listed``: the ids are places in a list, from 1; its holes are empty names. ``unused``: ids of COCO
    categories that no annotation of the file has.
    """

    def __init__(self, names: dict[int, str], listed: bool = False, unused: Iterable[int] = ()) -> None:
        super().__init__(names)
        self.listed = listed
        self.unused = frozenset(unused)


def parse_names(data: bytes, suffix: str = "") -> Names:
    """Id → name from the content of a label file; ``suffix`` is that of its name, which tells YAML.

    In JSON a whole number may be a name; its digits are used. Which class each name belongs to says
    :func:`pytorch_model.labels.classes.class_names`. Raises :class:`Reason` if this is not a label file, or
    if it may mean two things.
    """
    names = _parse(data, suffix.lower() in YAML_SUFFIXES)
    if all(map(is_hole, names.values())):
        raise Reason("it names no class")
    return names


def _parse(data: bytes, is_yaml: bool) -> Names:
    if not is_yaml and data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        try:
            content = parse_json(data)
        except Reason:
            names = _flow(data)  # {1: ant, 2: bee} and ['ant', 'bee'], as YAML and Python write them
            if names is None:
                raise
            return names
        return _from_content(content)
    if len(data) > _MOST_TEXT:
        raise Reason(f"it has {len(data):,} bytes, text may have {_MOST_TEXT:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Reason(f"byte {error.start} is not UTF-8 text") from None
    if _PBTXT.search(text):
        return _from_pbtxt(text)
    return _from_yaml(text) if is_yaml or _YAML.search(text) else _from_text(text)


# --- JSON and YAML ------------------------------------------------------------------------------------


def _flow(data: bytes) -> Names | None:
    """The names in a list or mapping that is YAML and not JSON; None if it is neither."""
    try:
        return _from_yaml(data.decode("utf-8-sig"))
    except (Reason, UnicodeDecodeError):
        return None


def _from_yaml(text: str) -> Names:
    from pytorch_model.formats.safe_yaml import load_texts  # PyYAML is loaded only for YAML

    if len(text) > _MOST_YAML:
        raise Reason(f"it has {len(text):,} characters, YAML may have {_MOST_YAML:,}")
    try:
        content = load_texts(text)
    except Reason as reason:
        raise Reason(f"it {reason}") from None
    if not isinstance(content, (list, dict)):
        raise Reason("its YAML is neither a list nor id: name")
    return _from_content(content)


def _from_content(content: Any) -> Names:
    """``content``: what JSON or YAML holds, a list or a mapping."""
    if isinstance(content, list):
        return _listed(content)
    if "categories" in content:
        return _from_coco(content)
    keys = [key for key in _KEYS if content.get(key) not in (None, "", "null", "~")]
    if len(keys) > 1:
        raise Reason(f"it has both {keys[0]} and {keys[1]}; leave one of them")
    if not keys:
        return parse_pairs(content)
    inner = content[keys[0]]
    if isinstance(inner, list):
        return _listed(inner)
    if not isinstance(inner, dict):
        raise Reason(f"its {keys[0]} is {reprlib.repr(inner)}, neither a list nor {{id: name}}")
    return parse_pairs(inner)


def parse_pairs(content: Mapping[Any, Any]) -> Names:
    """Id → name from a mapping of YAML or JSON, where ids may be text. Raises :class:`Reason`."""
    return Names(_by_id((str(key), name) for key, name in content.items()))


def _from_coco(content: Any) -> Names:
    try:
        pairs = [(category["id"], category["name"]) for category in content["categories"]]
    except KeyError as error:
        raise Reason(f"a category lacks {error}") from None
    except TypeError:
        raise Reason("its categories are not a list of objects with id and name") from None
    for index, _ in pairs:
        if type(index) is not int:
            raise Reason(f"the category id {reprlib.repr(index)} is not a whole number")
    entries = content.get("annotations")
    used = set()
    if isinstance(entries, list):
        ids = (entry.get("category_id") for entry in entries if isinstance(entry, dict))
        used = {index for index in ids if type(index) is int}
    names = _by_id((str(index), name) for index, name in pairs)
    return Names(names, unused=names.keys() - used if used else ())


# --- text ---------------------------------------------------------------------------------------------


def _from_pbtxt(text: str) -> Names:
    """A ``StringIntLabelMap``. ``display_name`` is the name for people; ``name`` may be a machine's id."""
    pairs: list[tuple[str, Any]] = []
    for item in parse_message(text).get("item", []):
        if not isinstance(item, dict):
            raise Reason(f"an item of the label map is {reprlib.repr(item)}, not a block")
        index, names = item.get("id"), item.get("display_name") or item.get("name")
        if not index or not names or not isinstance(index[-1], str) or not isinstance(names[-1], str):
            raise Reason(f"item {len(pairs) + 1} of the label map has no id or no name")
        pairs.append((index[-1], unescaped(names[-1])))
    return Names(_by_id(pairs))


def _from_text(text: str) -> Names:
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) == 1 and _is_json(text):
        raise Reason(f"{reprlib.repr(lines[0])} is JSON of another form")
    filled = [line for line in lines if line]
    pairs = [line.partition(":") for line in filled]
    numbered = [key for key, colon, _ in pairs if colon and key.strip().isdecimal()]
    if numbered and len(numbered) < len(pairs):
        raise Reason(f"some lines begin with an id ({reprlib.repr(numbered[0])}:), others do not")
    if numbered:
        return Names(_by_id((key.strip(), _unquoted(name)) for key, _, name in pairs))
    return _from_columns(filled) or _listed(lines)


def _from_columns(lines: Sequence[str]) -> Names | None:
    """Names from lines ``id name``, ``id,name`` or ``name,id``; None if the lines do not have ids.

    A header is left out. A number may also belong to a name ("50 km/h"), so ids must be those from 0 or 1 on,
    in any order.
    """
    if len(lines) > 1 and _HEADER.fullmatch(lines[0]):
        lines = lines[1:]
    for form in (_ID_FIRST, _ID_LAST):
        found = [form.fullmatch(line) for line in lines]
        pairs = [(int(match["id"]), _unquoted(match["name"])) for match in found if match]
        if pairs and len(pairs) == len(lines) and _are_ids(pairs):
            return Names(_by_id((str(index), name) for index, name in pairs))
    return None


def _are_ids(pairs: Sequence[tuple[int, str]]) -> bool:
    """Whether the numbers are ids and not parts of the names. Raises :class:`Reason` if they may be both."""
    ids = [index for index, _ in pairs]
    names = [canonical(name) for _, name in pairs if not is_hole(name)]
    least = min(ids)
    differ = least in (0, 1) and len(set(ids)) == len(ids)
    if not differ or 2 * len(set(names)) <= len(names) > 1:  # "1 euro", "2 euro"
        return False
    if sorted(ids) == list(range(least, least + len(ids))) or _are_cocos(pairs):
        return True
    raise Reason(
        "its lines begin or end with numbers that differ but leave some out, so they may be ids or parts "
        "of the names; write `id: name`"
    )


def _are_cocos(pairs: Iterable[tuple[int, str]]) -> bool:
    """Whether each name is COCO's for its id, or each is for the id counted from 0."""
    named = [(index, canonical(name)) for index, name in pairs if not is_hole(name)]
    known = {canonical(name): index for index, name in enumerate(COCO_NAMES, start=1) if name}
    return {known.get(name, -9) - index for index, name in named} in ({0}, {1})


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _unquoted(name: str) -> str:
    return name.strip().strip("'\"")


# --- all forms ----------------------------------------------------------------------------------------


def _listed(names: Iterable[Any]) -> Names:
    return Names(_by_id((str(index), name) for index, name in enumerate(names, start=1)), listed=True)


def _by_id(pairs: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Raises :class:`Reason` for an invalid id, a name that is not text, and an id that occurs twice."""
    found = [
        (key, str(name) if type(name) is int else name) for key, name in pairs
    ]  # data sets of digits have them
    for key, name in found:
        if not _ID.fullmatch(key):
            raise Reason(f"{reprlib.repr(key)} is not a class id")
        if not isinstance(name, str) or len(name) > _MOST_NAME or not _is_line(name):
            raise Reason(f"the name of class {key} is {reprlib.repr(name)}, not one line of text")
    counted = Counter(int(key) for key, _ in found)
    twice = [index for index, count in counted.items() if count > 1]
    if twice:
        raise Reason(f"it names class {twice[0]} twice")
    return {int(key): name for key, name in found}


def _is_line(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)
