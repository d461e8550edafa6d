"""Run an exported model as a whole: an image in grey levels goes in, detections come out.

Score thresholds are set to zero, so that any image has detections. Only files with an input of grey levels or
of encoded images, and with AutoML's outputs, can be run so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from porting.synthetic import synthetic_image

_SEED = 12
_UINT8, _STRING, _FLOAT = 4, 7, 1  # types.proto
# Suppression → number of its input for the score threshold
_THRESHOLDS = {
    "NonMaxSuppressionV3": 4,
    "NonMaxSuppressionV4": 4,
    "NonMaxSuppressionV5": 4,
    "CombinedNonMaxSuppression": 5,
}


class Detections(NamedTuple):
    """``image``: uint8 [h, w, 3]; ``boxes_yxyx`` [M, 4], in its pixels; ``scores`` and ``class_ids`` [M]."""

    image: np.ndarray
    boxes_yxyx: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray


def exported_detections(source: Path, size: tuple[int, int]) -> Detections | None:
    """The detections of the file or folder ``source`` in a seeded image of about ``size``, (height, width).

    None if it does not take grey levels and give detections, or cannot be run. Imports TensorFlow.
    """
    import tensorflow as tf

    folder = source.parent if source.name == "saved_model.pb" else source
    run: Callable[[Path, tuple[int, int]], tuple[np.ndarray | None, list[np.ndarray]]]
    if source.suffix == ".tflite":
        run = _run_tflite
    elif folder.is_dir():
        source, run = folder, _run_saved_model
    elif source.suffix == ".pb":
        run = _run_frozen
    else:
        return None
    try:
        image, outputs = run(source, size)
    except (KeyError, OSError, RuntimeError, ValueError, tf.errors.OpError):
        return None  # the network in it was compared; it needs an input of another kind
    return None if image is None else _detections(image, outputs)


def _picture(shape: Sequence[int | None], size: tuple[int, int]) -> np.ndarray:
    """A seeded image for an input of ``shape``, [N, h, w, 3]; unlike the network's shape if that is free."""
    height, width = (size[0] * 4 // 5, size[1] * 11 // 10)
    return synthetic_image(shape[1] or height, shape[2] or width, _SEED)


def _detections(image: np.ndarray, outputs: Iterable[np.ndarray]) -> Detections | None:
    arrays = [np.asarray(x, np.float64) for x in outputs]
    rows = next((x[0] for x in arrays if x.ndim == 3 and x.shape[2] == 7), None)  # TensorFlow 1's exporter
    if rows is None:
        boxes = next((x[0] for x in arrays if x.ndim == 3 and x.shape[2] == 4), None)
        lists = [x[0] for x in arrays if boxes is not None and x.ndim == 2 and x.shape[1] == len(boxes)]
        if boxes is None or len(lists) != 2:
            return None
        # Class ids are whole numbers from 1, scores are below 1.
        scores, classes = sorted(lists, key=lambda x: float(x.max(initial=0)))
    else:
        boxes, scores, classes = rows[:, 1:5], rows[:, 5], rows[:, 6]
    found = scores > 0
    return Detections(image, boxes[found], scores[found], np.rint(classes[found]).astype(np.int64))


# --- the kinds of files --------------------------------------------------------------------------------


def _run_saved_model(folder: Path, size: tuple[int, int]) -> tuple[np.ndarray | None, list[np.ndarray]]:
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for meta in model.meta_graphs:
        _lower_thresholds(meta.graph_def)
    with tempfile.TemporaryDirectory() as temporary:
        for entry in folder.iterdir():
            if entry.name not in ("saved_model.pb", "fingerprint.pb"):
                os.symlink(entry.absolute(), Path(temporary) / entry.name)
        (Path(temporary) / "saved_model.pb").write_bytes(model.SerializeToString())
        loaded = tf.saved_model.load(temporary)
        for signature in loaded.signatures.values():
            inputs = list(signature.structured_input_signature[1].items())
            if len(inputs) == 1 and inputs[0][1].dtype == tf.uint8 and inputs[0][1].shape.rank == 4:
                name, spec = inputs[0]
                image = _picture(spec.shape.as_list(), size)
                outputs = signature(**{name: tf.constant(np.stack([image] * (spec.shape[0] or 1)))})
                return image, [
                    x.numpy() for x in outputs.values() if x.dtype.is_floating or x.dtype.is_integer
                ]
    return None, []


def _run_frozen(path: Path, size: tuple[int, int]) -> tuple[np.ndarray | None, list[np.ndarray]]:
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    _lower_thresholds(graph_def)
    holders = [node for node in graph_def.node if node.op == "Placeholder"]
    if len(holders) != 1 or holders[0].attr["dtype"].type not in (_UINT8, _STRING):
        return None, []
    shape = [
        dimension.size if dimension.size > 0 else None for dimension in holders[0].attr["shape"].shape.dim
    ]
    is_text = holders[0].attr["dtype"].type == _STRING
    image = _picture((None, None, None, 3) if is_text else shape, size)
    fed = [tf.io.encode_png(image).numpy()] if is_text else image[None]
    read = {x.lstrip("^").partition(":")[0] for node in graph_def.node for x in node.input}
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.import_graph_def(graph_def, name="")
        last = [graph.get_operation_by_name(node.name) for node in graph_def.node if node.name not in read]
        wanted = [x for op in last for x in op.outputs if x.dtype in (tf.float32, tf.int32, tf.int64)]
        return image, session.run(wanted, {f"{holders[0].name}:0": fed})


def _run_tflite(path: Path, size: tuple[int, int]) -> tuple[np.ndarray | None, list[np.ndarray]]:
    from porting.parity.reference.tflite import tflite_interpreter

    interpreter = tflite_interpreter(path)
    (detail,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    if detail["dtype"] != np.uint8 or [len(x["shape"]) for x in outputs] != [3]:
        return None, []  # normalised images, or TFLite's operator: anchors and normalisation are read from it
    image = _picture(detail["shape"].tolist(), size)
    interpreter.set_tensor(detail["index"], image[None])
    interpreter.invoke()
    return image, [interpreter.get_tensor(x["index"]) for x in outputs]


def _lower_thresholds(graph_def: Any) -> None:
    """Give every suppression in ``graph_def``, also in its functions, a score threshold of zero."""
    for nodes, suffix in [
        (graph_def.node, ""),
        *((function.node_def, ":output:0") for function in graph_def.library.function),
    ]:
        suppressions = [node for node in nodes if node.op in _THRESHOLDS]
        for node in suppressions:
            zero = nodes.add(name=f"{node.name}/parity_threshold", op="Const")
            zero.attr["dtype"].type = _FLOAT
            zero.attr["value"].tensor.dtype = _FLOAT
            zero.attr["value"].tensor.tensor_shape.SetInParent()
            zero.attr["value"].tensor.float_val.append(0.0)
            node.input[_THRESHOLDS[node.op]] = zero.name + suffix
