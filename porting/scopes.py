"""Names in an AutoML checkpoint: suffixes, training's own scalars, and the scopes of the network's layers.

``rules.py`` and ``tf_reference/variables.py`` spell these names themselves, on purpose: each checks the
other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pytorch_model.config import Node

EMA_SUFFIX = "/ExponentialMovingAverage"
MOMENTUM_SUFFIX = "/Momentum"

#: Optimizer slots: suffixes that TensorFlow's optimizers add to the name of a trainable variable.
SLOT_SUFFIXES = (MOMENTUM_SUFFIX, "/Adam", "/Adam_1", "/RMSProp", "/RMSProp_1", "/Adagrad")

#: The two variables of a batch norm that training updates without gradients.
STATISTICS = ("/moving_mean", "/moving_variance")

#: Scalars of the training loop, not part of the model: Adam's, those of mixed precision's loss scale, and the
#: mean number of positives that ``positives_momentum`` keeps (AutoML ``det_model_fn.py``).
TRAINING_SCALARS = frozenset(
    {
        *("global_step", "learning_rate", "beta1_power", "beta2_power"),
        *("current_loss_scale", "good_steps", "moving_normalizer"),
    }
)

#: Scopes of AutoML's segmentation head, by name and in the tree of objects (``efficientdet_keras.py``). This
#: project builds the detector only.
SEGMENTATION_SCOPES = ("segmentation_head/", "seg_head/")

#: Why a checkpoint of AutoML's other pyramid is rejected.
QUFPN = (
    "was trained with fpn_name=qufpn (QuFPN, a pyramid of four paths), which this project does not build; "
    "only BiFPN is supported"
)

#: Scope of a head → the beginning of the names of its layers.
HEADS = {"class_net": "class", "box_net": "box"}


def is_qufpn(nodes: int, levels: int) -> bool:
    """Whether a cell of ``nodes`` nodes is QuFPN's: four paths of ``levels`` − 1 nodes, and a sum per level.

    Source: AutoML ``fpn_configs.py``.
    """
    return levels > 1 and nodes == 5 * levels - 4


#: The outermost scope of a variable of the model, and what is before it: ``model/`` of ``model/class_net/…``.
_OUTER_SCOPE = re.compile(
    r"(?P<outer>(?:.+?/)??)(efficientnet-[^/]+|resample_p\d+|fpn_cells|class_net|box_net)/"
)


def outer_scope(names: Iterable[str]) -> str:
    """The scope around all of the model's variables: ``model/``; empty if there is none, or more than one."""
    found = {match["outer"] for match in map(_OUTER_SCOPE.match, names) if match}
    return found.pop() if len(found) == 1 else ""


def model_name(name: str) -> str | None:
    """The model variable that a checkpoint entry belongs to; None for training's own scalars."""
    if name in TRAINING_SCALARS:
        return None
    for suffix in (EMA_SUFFIX, *SLOT_SUFFIXES):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def numbered(name: str, index: int) -> str:
    """The name that TensorFlow gives to the ``index``-th (from 0) of several things called ``name``."""
    return f"{name}_{index}" if index else name


def extra_level(level: int) -> str:
    """The resampling that makes the pyramid level ``level``, above the backbone's."""
    return f"resample_p{level}"


def bifpn_node(cell: int, index: int) -> str:
    """Node ``index`` of BiFPN cell ``cell``."""
    return f"fpn_cells/cell_{cell}/fnode{index}"


def resampled_input(node: Node, index: int) -> str:
    """The resampling of input ``index`` of ``node``, inside the scope of the node."""
    return f"resample_{index}_{node.inputs[index]}_{node.id}"


def after_combine(node: Node) -> str:
    """The convolution and the batch norm after the sum of ``node``, inside the scope of the node."""
    return f"op_after_combine{node.id}"


def head_layer(head: str, repeat: int) -> str:
    """Convolution ``repeat`` of a head; all pyramid levels share it."""
    return f"{head}/{HEADS[head]}-{repeat}"


def head_norm(head: str, repeat: int, level: int) -> str:
    """The batch norm after :func:`head_layer`; each pyramid level has its own."""
    return f"{head_layer(head, repeat)}-bn-{level}"


def head_predictor(head: str) -> str:
    """The last convolution of a head, which predicts."""
    return f"{head}/{HEADS[head]}-predict"
