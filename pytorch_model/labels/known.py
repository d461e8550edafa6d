"""The classes of known data sets, and when two names mean the same.

Sources: COCO's annotations (cocodataset.org), PASCAL VOC 2012, AutoML ``label_util.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Names of COCO's class ids 1 to 90, in order; ten ids have none.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,"
    "laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
COCO_NAMES = tuple(_COCO_NAMES.split(","))

_VOC_NAMES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,"
    "pottedplant,sheep,sofa,train,tvmonitor"
)


def _by_id(names: Iterable[str]) -> Mapping[int, str]:
    return {index: name for index, name in enumerate(names, start=1) if name}


#: The names that AutoML's ``label_map`` may have → class id → name.
LABEL_MAPS: Mapping[str, Mapping[int, str]] = {
    "coco": _by_id(COCO_NAMES),
    "voc": _by_id(_VOC_NAMES.split(",")),
    "waymo": _by_id(("vehicle", "pedestrian", "cyclist")),
}

# Other spellings of COCO's names, both as :func:`_plain` makes them.
_SPELLINGS = {
    "aeroplane": "airplane",
    "plane": "airplane",
    "bike": "bicycle",
    "cellularphone": "cellphone",
    "mobilephone": "cellphone",
    "phone": "cellphone",
    "doughnut": "donut",
    "fridge": "refrigerator",
    "hairdryer": "hairdrier",
    "motorbike": "motorcycle",
    "people": "person",
    "pottedplants": "pottedplant",
    "remotecontrol": "remote",
    "ski": "skis",
    "sofa": "couch",
    "sportball": "sportsball",
    "table": "diningtable",
    "teddy": "teddybear",
    "television": "tv",
    "trafficlights": "trafficlight",
    "tvmonitor": "tv",
}

# What label files write where an id has no name, and where the first entry stands for no class.
_HOLES = frozenset(("", "???", "n/a", "unlabeled", "unlabelled"))
_BACKGROUND = frozenset(("background", "bg", "ignore", "none"))


def canonical(name: str) -> str:
    """The same for all spellings of a name: without case, spaces, ``-`` and ``_``; ``sofa`` is ``couch``."""
    plain = _plain(name)
    return _SPELLINGS.get(plain, plain)


def is_hole(name: str) -> bool:
    """Whether ``name`` says that an id has no name: empty, ``???``, ``N/A``, ``unlabeled``."""
    return _plain(name) in _HOLES


def is_no_class(name: str) -> bool:
    """Whether ``name`` at the first place or id 0 stands for no class: a hole, or ``__background__``, …"""
    return is_hole(name) or _plain(name) in _BACKGROUND


def is_coco_80(names: Iterable[str]) -> bool:
    """Whether these are COCO's 80 names, in COCO's order and without the ids that have none."""
    return [canonical(name) for name in names] == _COCO_80


def _plain(name: str) -> str:
    return "".join(
        character for character in name.casefold() if not character.isspace() and character not in "-_"
    )


_COCO_80 = [canonical(name) for name in COCO_NAMES if name]
