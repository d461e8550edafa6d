"""A reference from a file: a TFLite file, run by TensorFlow Lite's interpreter.

The activations of an int8 file are rounded, those of its ported weights are not. So this shows the effect of
quantisation, layer by layer, whereas :mod:`tf_reference` shows whether the port is right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from porting.checkpoint.tflite.checkpoint import TFLiteCheckpoint
from porting.checkpoint.tflite.structure import Normalisation
from porting.errors import EfficientDetError
from porting.parity.lockstep import Reference
from porting.rules import taps
from pytorch_model.config import EfficientDetConfig

_NEARLY = 1e-2  # grey levels: float32 rounding of the normalisation, far below the half that would mislead


class TFLiteReference:
    """The TFLite file at ``path`` as a reference for ``config``, see :class:`FileReference`.

    It shows the outputs of its convolutions, activation and batch norm included. It shows nothing for
    AutoML's taps between the two or after a pooling. Raises :class:`CheckpointError` for a file of another
    kind and :class:`EfficientDetError` if it lacks an output of ``config``.
    """

    def __init__(self, path: str | os.PathLike[str], config: EfficientDetConfig) -> None:
        self.source = str(path)
        checkpoint = TFLiteCheckpoint(path)
        image_size: tuple[int, int] = checkpoint.settings["image_size"]
        self.size = image_size
        self._pixels = checkpoint.pixels
        self.exact = {layer.convolution.kernel.dtype for layer in checkpoint.layers} == {np.dtype(np.float32)}
        found = {**dict(_layer_taps(checkpoint, config)), **checkpoint.outputs}
        self._tensors = {pair.tap: found[pair.tap] for pair in taps(config) if pair.tap in found}
        self.taps = frozenset(self._tensors)
        missing = [pair.tap for pair in taps(config) if pair.output is not None and pair.tap not in self.taps]
        if missing:
            raise EfficientDetError(f"{path} has no {missing[0]}: it is not {config.name}'s; check --graph")

    def on(self, images: np.ndarray) -> Reference:
        values = tflite_tensors(self.source, images, self._tensors, self._pixels)

        def run(emit: Callable[[str, np.ndarray], None]) -> None:
            for name in list(values):
                emit(name, values.pop(name))

        return run


def _layer_taps(checkpoint: TFLiteCheckpoint, config: EfficientDetConfig) -> Iterator[tuple[str, int]]:
    """Tap → tensor, by the scope of each convolution's batch norm."""
    blocks = {f"{config.backbone.name}/blocks_{i}": block for i, block in enumerate(config.backbone.blocks)}
    for layer in checkpoint.layers:
        scope, _, leaf = (layer.bn or "").rpartition("/")
        output = layer.convolution.output
        if scope.startswith("fpn_cells/") and leaf == "bn" and "/op_after_combine" in scope:
            yield scope.rpartition("/")[0], output
        elif scope.endswith("/stem"):
            yield scope, output
        elif scope in blocks:
            yield layer.bn or "", output
            is_last = leaf.endswith("_2" if blocks[scope].expand_ratio != 1 else "_1")
            if is_last and not blocks[scope].has_residual:
                yield scope, output


def tflite_tensors(
    path: str | os.PathLike[str],
    images: np.ndarray,
    tensors: Mapping[str, int],
    pixels: Normalisation | None = None,
) -> dict[str, np.ndarray]:
    """Activations of the file at ``path``: ``tensors`` is name → number of the tensor in the file.

    ``images``: [N, H, W, 3], normalised, of the file's own size. ``pixels``: how the file normalises grey
    levels, None if it takes normalised images. Returns name → float32 [N, …], one entry per
    image, dequantised if the file is quantised. Imports TensorFlow. Raises :class:`EfficientDetError` for
    another size, and for values that are no grey levels.
    """
    interpreter = tflite_interpreter(path)
    (image,) = interpreter.get_input_details()
    if tuple(image["shape"]) != (1, *images.shape[1:]):
        raise EfficientDetError(
            f"{path} takes images of {image['shape'][1:].tolist()}, not {list(images.shape[1:])}; resize them"
        )
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    values: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    if pixels is not None:
        images = _grey_levels(images, pixels, path)
    for one in images[:, None]:
        interpreter.set_tensor(image["index"], _quantize(one, image))
        interpreter.invoke()
        for name, index in tensors.items():
            values[name].append(_dequantize(interpreter.get_tensor(index), details[index]))
    return {name: np.concatenate(found) for name, found in values.items()}


def _grey_levels(images: np.ndarray, pixels: Normalisation, path: str | os.PathLike[str]) -> np.ndarray:
    """The whole grey levels, 0 to 255, that ``pixels`` normalises to ``images``."""
    levels = images.astype(np.float64) * pixels.stddev_rgb + pixels.mean_rgb
    whole = np.clip(np.rint(levels), 0, 255)
    if np.abs(levels - whole).max() > _NEARLY:
        raise EfficientDetError(
            f"{path} takes whole grey levels, and the image has others, such as padding of 0 after "
            "normalisation; leave out --image, or give one of the network's shape, and use the file's "
            "mean and standard deviation"
        )
    return whole


def tflite_interpreter(path: str | os.PathLike[str]):  # type: ignore[no-untyped-def]  # TensorFlow ships no types
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # TensorFlow announces that the interpreter will move to another package
        interpreter = tf.lite.Interpreter(
            os.fspath(path),
            experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,  # otherwise later layers reuse their memory
        )
    interpreter.allocate_tensors()
    return interpreter


def _quantize(values: np.ndarray, detail: Mapping[str, np.ndarray]) -> np.ndarray:
    """Real values → values in the type of the tensor of ``detail``."""
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
