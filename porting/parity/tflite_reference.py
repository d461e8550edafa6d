"""The other reference: a TFLite file itself, run by TensorFlow Lite's interpreter.

What an int8 file computes differs from its ported weights by the rounding of its activations, so this shows
what quantisation did, layer by layer, where :mod:`tf_reference` shows whether the port is right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import numpy as np

from porting.checkpoint.tflite import TFLiteCheckpoint
from porting.errors import PortingError


def tflite_outputs(path: str | os.PathLike[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """The head outputs of the file at ``path``: ``class_outputs/3``, …, ``box_outputs/7``, by name.

    ``images``: [N, H, W, 3], normalised, of the file's own size. Each output is float32 [N, H_l, W_l, C],
    before any sigmoid or decoding, dequantised where the file is quantised. Imports TensorFlow. Raises
    :class:`CheckpointError` for a file that is no EfficientDet-Lite, :class:`PortingError` for another size.
    """
    return tflite_tensors(path, images, TFLiteCheckpoint(path).outputs)


def tflite_tensors(
    path: str | os.PathLike[str], images: np.ndarray, tensors: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Any activations of a TFLite file: ``tensors`` is name → number of the tensor in the file.

    Returns name → float32 [N, …], one batch entry per image. Otherwise as :func:`tflite_outputs`.
    """
    interpreter = _interpreter(path)
    (image,) = interpreter.get_input_details()
    if tuple(image["shape"]) != (1, *images.shape[1:]):
        raise PortingError(
            f"{path} takes images of {image['shape'][1:].tolist()}, not {list(images.shape[1:])}; resize them"
        )
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    values: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    for one in images[:, None]:
        interpreter.set_tensor(image["index"], _quantize(one, image))
        interpreter.invoke()
        for name, index in tensors.items():
            values[name].append(_dequantize(interpreter.get_tensor(index), details[index]))
    return {name: np.concatenate(found) for name, found in values.items()}


def _interpreter(path: str | os.PathLike[str]):  # type: ignore[no-untyped-def]  # TensorFlow ships no types
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow announces that the interpreter will move house
        interpreter = tf.lite.Interpreter(
            os.fspath(path),
            experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,  # else their memory is used again, layer after layer
        )
    interpreter.allocate_tensors()
    return interpreter


def _quantize(values: np.ndarray, detail: Mapping[str, np.ndarray]) -> np.ndarray:
    """Real values → what the tensor of ``detail`` takes."""
    dtype = np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if not scale:
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values / scale + zero_point), limits.min, limits.max).astype(dtype)


def _dequantize(stored: np.ndarray, detail: Mapping[str, np.ndarray]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    if not scale:
        return stored.astype(np.float32)
    return ((stored.astype(np.float64) - zero_point) * scale).astype(np.float32)
