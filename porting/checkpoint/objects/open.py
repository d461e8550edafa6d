"""Open an object-based checkpoint: recognise which of the known models it holds, and read it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.messages import shortened
from porting.checkpoint.objects import automl_keras, detection_api
from porting.checkpoint.objects.graph import ObjectTree
from porting.checkpoint.objects.pipeline_config import read_pipeline
from porting.checkpoint.v2.bundle import TensorBundle
from porting.errors import CheckpointError


@dataclass(frozen=True)
class KnownTree:
    """A model that can be read. ``parts``: the attributes by which its object is recognised."""

    parts: Collection[str]
    read: Callable[[ObjectTree, int], Checkpoint]


#: In the order in which they are looked for.
KNOWN_TREES = (
    KnownTree(automl_keras.PARTS, automl_keras.read),
    KnownTree(detection_api.PARTS, detection_api.read),
    KnownTree(automl_keras.HUB_PARTS, automl_keras.read_hub),
)


def open_object_checkpoint(bundle: TensorBundle) -> Checkpoint:
    """The AutoML variables of an object-based checkpoint, with moving averages and optimizer slots.

    Raises CheckpointError with the reason if it holds neither AutoML's Keras EfficientDet nor the Object
    Detection API's, or several models, or one that cannot be ported exactly.
    """
    tree = ObjectTree(bundle)
    for known in KNOWN_TREES:
        root = tree.root(known.parts)
        if root is not None:
            return known.read(tree, root)
    place = detection_api.find_pipeline(bundle.source)
    if place is not None:
        read_pipeline(place)  # names the detector if it is another one of the Object Detection API
    parts = ", ".join(shortened(name) for name in list(tree.nodes[0].children)[:8]) or "no attributes"
    raise CheckpointError(
        f"{bundle.source} is an object-based checkpoint, but not of an EfficientDet: no object in it has the "
        f"parts {', '.join(automl_keras.PARTS)}; at its top are {parts}"
    )
