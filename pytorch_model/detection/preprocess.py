"""Images in, network input out, as in AutoML's evaluation, bit for bit: decode, normalise, resize, pad.

Sources: AutoML ``dataloader.py`` (``DetectionInputProcessor``); TensorFlow's ``ResizeBilinear`` kernel with
half-pixel centres; ``tf.io.decode_jpeg``. The order is AutoML's and matters: normalise, resize, then pad
with zeros, so that the padding has the mean colour. The Object Detection API has the same order
(TensorFlow Models ``research/object_detection``: ``meta_architectures/ssd_meta_arch.py``) and other ways to
resize (``core/preprocessor.py``; the same kernel without half-pixel centres); ``config.resizer`` says which.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytorch_model.config import EfficientDetConfig, Resizer
from pytorch_model.detection.resizing.host import resize_on_host
from pytorch_model.detection.resizing.tensors import normalise, resize_bilinear
from pytorch_model.detection.settings import DECODERS, FORMATS
from pytorch_model.detection.suppression.host import on_host
from pytorch_model.errors import EfficientDetError
from pytorch_model.files import check_regular

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor"

# Of an image in a file. Reading and normalising take about 27 bytes per pixel: 3.6 GB. Panoramas of 20,000 x
# 2,000 and the 108 million pixels of a phone's camera are below; more pixels add nothing after resizing.
# Pillow itself warns above 89 million pixels (silenced here) and rejects images above 179 million.
MOST_PIXELS = 1 << 27
MOST_BYTES = 8 * MOST_PIXELS  # of a file: four channels of 16 bits, uncompressed


class ImageError(EfficientDetError):
    """An image cannot be read, or the network cannot use it."""


class DecodedImage(NamedTuple):
    pixels: Tensor  # uint8 [3, h, w], RGB
    decoder: str  # its decoder: "pillow", "fast-dct", or "none" for an image given as pixels
    orientation: int = 1  # the EXIF orientation that was undone; 1: none


class NetworkInput(NamedTuple):
    images: Tensor  # float32 [N, 3, H, W], normalised, padded at the bottom or the right
    image_scales: Tensor  # float32 [N, 2]: original pixels per network pixel, down and across
    decoders: tuple[str, ...]  # per image, as in DecodedImage


def preprocess(
    images: Sequence[ImageSource] | Tensor,
    config: EfficientDetConfig,
    image_size: tuple[int, int] | None = None,
    decoder: str = "pillow",
    device: torch.device | str | None = None,
) -> NetworkInput:
    """Read images into one batch, ready for ``EfficientDet``.

    ``images``: any mix of files, encoded images (bytes), PIL images, uint8 RGB arrays [h, w, 3] and uint8 RGB
    tensors [3, h, w], of any sizes; or one uint8 tensor [N, 3, h, w]. ``image_size`` (height, width) defaults
    to ``config.image_size``. ``decoder`` is described at :func:`load_image`. ``device`` is the device of the
    work and of the result; by default the device of the first image: the CPU unless it is a tensor. Nothing
    forces a GPU synchronisation (tested with PyTorch's fake tensors). Raises :class:`ImageError` with the
    image's name or number, and if ``config.resizer`` does not pad and the inputs would have several sizes.
    """
    batches = preprocess_batches(images, config, image_size, decoder, device)
    if len(batches) > 1:
        sizes = " and ".join(f"{batch.images.shape[3]} x {batch.images.shape[2]}" for batch in batches[:2])
        raise ImageError(
            f"the images make network inputs of {sizes} pixels, because this model's resizer does not pad; "
            "give them one by one"
        )
    return batches[0]


def preprocess_batches(
    images: Sequence[ImageSource] | Tensor,
    config: EfficientDetConfig,
    image_size: tuple[int, int] | None = None,
    decoder: str = "pillow",
    device: torch.device | str | None = None,
) -> list[NetworkInput]:
    """As :func:`preprocess`, for any images: a new batch begins where the size of the input changes.

    There is one batch unless ``config.resizer`` does not pad.
    """
    target = image_size or config.image_size
    loaded = _load(images, decoder)
    device = loaded[0].pixels.device if device is None else device
    inputs = []
    for index, (pixels, decoders) in enumerate(loaded):
        try:
            inputs.append(network_input(pixels.to(device), config, target, decoders))
        except ImageError as error:
            raise ImageError(f"{_describe(images[index], index)}: {error}") from None
    return stacked(inputs)


class _Loaded(NamedTuple):
    pixels: Tensor  # uint8 [n, 3, h, w]
    decoders: tuple[str, ...]


def _load(images: Sequence[ImageSource] | Tensor, decoder: str) -> list[_Loaded]:
    """Batches of equal-sized pixels: one per image, or the given batch."""
    _check_decoder(decoder)
    is_batch = isinstance(images, Tensor) and images.ndim == 4
    if not is_batch and (isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence)):
        raise ImageError("images must be a list of images or one uint8 tensor [N, 3, h, w]")
    if len(images) == 0:
        raise ImageError("there are no images; give at least one")
    if isinstance(images, Tensor):
        _check_tensor(images[0])
        return [_Loaded(images, ("none",) * len(images))]
    decoded = []
    for index, image in enumerate(images):
        try:
            decoded.append(load_image(image, decoder))
        except ImageError as error:
            raise ImageError(f"{_describe(image, index)}: {error}") from None
    return [_Loaded(image.pixels[None], (image.decoder,)) for image in decoded]


def _describe(image: object, index: int) -> str:
    return str(image) if isinstance(image, (str, os.PathLike)) else f"image number {index}"


def network_input(
    pixels: Tensor, config: EfficientDetConfig, target: tuple[int, int], decoders: tuple[str, ...]
) -> NetworkInput:
    """uint8 [n, 3, h, w] → its input of ``target`` (height, width), on its device, the scales on the CPU.

    Raises :class:`ImageError` if a side would become 0.
    """
    resizer = config.resizer
    rule = _RULES[resizer.rule]
    size, scales = scaled((pixels.shape[2], pixels.shape[3]), target, resizer)
    inner = target if resizer.pad else size
    images = torch.zeros(len(pixels), 3, *resizer.padded(inner), device=pixels.device)
    if any(resizer.pad_value) and inner != size:
        for channel, value in enumerate(resizer.pad_value):
            images[:, channel, : inner[0], : inner[1]] = value
    place = images[:, :, : size[0], : size[1]]
    if on_host(pixels):
        resize_on_host(pixels.numpy(), config, rule.half_pixel_centres, place.numpy())
    else:
        place.copy_(resize_bilinear(normalise(pixels, config), size, rule.half_pixel_centres))
    return NetworkInput(images, torch.from_numpy(np.tile(scales, (len(pixels), 1))), decoders)


def stacked(inputs: Sequence[NetworkInput]) -> list[NetworkInput]:
    """``inputs`` in batches, the scales beside the images: a new one begins where the size changes."""
    batches = []
    for _, group in itertools.groupby(inputs, key=lambda each: each.images.shape[2:]):
        images, scales, decoders = zip(*group, strict=True)
        joined = images[0] if len(images) == 1 else torch.cat(images)
        batches.append(NetworkInput(joined, torch.cat(scales).to(joined.device), sum(decoders, ())))
    return batches


# ---------------------------------------------------------------------------------------------------
# Resizing
# ---------------------------------------------------------------------------------------------------


def scaled(
    size: tuple[int, int], target: tuple[int, int], resizer: Resizer
) -> tuple[tuple[int, int], np.ndarray]:
    """What becomes of an image of ``size`` in an input of ``target`` pixels, both (height, width).

    Returns the scaled size, without padding, and float32 [2]: original pixels per network pixel, down and
    across. Raises :class:`ImageError` if a side would become 0.
    """
    scaled_size, scales = _RULES[resizer.rule].scale(size, target, resizer)
    if min(scaled_size) < 1:
        raise ImageError(
            f"{size[1]} x {size[0]} pixels is too long and thin: scaled into {target[1]} x {target[0]} "
            "its short side has no pixel left; crop it first"
        )
    return scaled_size, scales


def _automl(
    size: tuple[int, int], target: tuple[int, int], resizer: Resizer
) -> tuple[tuple[int, int], np.ndarray]:
    """In float32 with the scaled size truncated: 1080 x 1920 becomes 288 x 512. Both axes have one scale."""
    height, width, scale = _fit(size, target)
    return (int(height * scale), int(width * scale)), np.full(2, np.float32(1) / scale)


def _fixed_shape(
    size: tuple[int, int], target: tuple[int, int], resizer: Resizer
) -> tuple[tuple[int, int], np.ndarray]:
    return target, np.array(size, np.float32) / np.array(target, np.float32)


def _keep_aspect_ratio(
    size: tuple[int, int], target: tuple[int, int], resizer: Resizer
) -> tuple[tuple[int, int], np.ndarray]:
    """In float32 with the scaled size rounded, halves to even. The rounded sizes give each axis its scale."""
    longest = resizer.min_dimension or max(target)
    landscape = size[0] < size[1]
    box = (min(target[0], longest), target[1]) if landscape else (target[0], min(target[1], longest))
    height, width, scale = _fit(size, box)
    rounded = int(np.rint(height * scale)), int(np.rint(width * scale))
    return rounded, np.array(size, np.float32) / np.maximum(rounded, 1).astype(np.float32)


def _fit(size: tuple[int, int], box: tuple[int, int]) -> tuple[np.float32, np.float32, np.float32]:
    """(height, width, the largest scale at which they fit ``box``), in float32."""
    height, width = np.float32(size[0]), np.float32(size[1])
    return height, width, np.minimum(np.float32(box[0]) / height, np.float32(box[1]) / width)


class _Rule(NamedTuple):
    """``scale``: see :func:`scaled`. ``half_pixel_centres``: see :func:`resize_bilinear`."""

    scale: Callable[[tuple[int, int], tuple[int, int], Resizer], tuple[tuple[int, int], np.ndarray]]
    half_pixel_centres: bool


#: ``config.resizer.rule`` → what it does.
_RULES: Mapping[str, _Rule] = {
    "automl": _Rule(_automl, half_pixel_centres=True),
    "fixed_shape": _Rule(_fixed_shape, half_pixel_centres=False),
    "keep_aspect_ratio": _Rule(_keep_aspect_ratio, half_pixel_centres=False),
}


def normalise_array(pixels: np.ndarray, config: EfficientDetConfig) -> np.ndarray:
    """uint8 [..., h, w, 3] → float32 of the same shape: :func:`normalise` for NumPy arrays."""
    mean, stddev = np.array(config.mean_rgb, np.float32), np.array(config.stddev_rgb, np.float32)
    return (pixels.astype(np.float32) - mean) / stddev


# ---------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------


def load_image(image: ImageSource, decoder: str = "pillow", upright: bool = False) -> DecodedImage:
    """Read one image. As with ``tf.io.decode_image``, EXIF orientation and alpha are ignored.

    ``upright`` applies the EXIF orientation of a file or a PIL image. The orientation of a TIFF file is part
    of the format: Pillow always applies it, and 1 remains.

    A file, or its content as bytes, must be in one of :data:`FORMATS`, whatever its name; of several images
    in it the first is used. ``decoder="pillow"`` reads all of them with Pillow, whose JPEG arithmetic is
    accurate and equals TensorFlow's ``dct_method="INTEGER_ACCURATE"``. ``decoder="fast-dct"`` reads JPEG
    files with the fast DCT of libjpeg-turbo (package ``simplejpeg``), which equals the default of
    ``tf.io.decode_jpeg`` and so AutoML's evaluation; other formats go to Pillow. Greyscale becomes three
    equal channels. Raises :class:`ImageError` if the file is missing, damaged or not an image, or the pixels
    are not uint8 RGB.
    """
    _check_decoder(decoder)
    if isinstance(image, (str, os.PathLike)):
        return _decoded(read_image_file(Path(image)), decoder, upright)
    if isinstance(image, bytes):
        return _decoded(image, decoder, upright)
    if isinstance(image, Tensor):
        return DecodedImage(_check_tensor(image), "none")
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"an array must be uint8 [h, w, 3] in RGB order, not {list(image.shape)}")
        if image.dtype != np.uint8:
            raise ImageError(f"pixels must be uint8, 0 to 255, not {image.dtype}")
        return DecodedImage(_check_tensor(_channels_first(image)), "none")
    if type(image).__module__.startswith("PIL."):
        pixels = _channels_first(_pillow_array(image))
        return _turned(pixels, "pillow", _orientation(image) if upright else 1)
    raise ImageError(
        f"{type(image).__name__} is not an image; give a path, a PIL image, an array or a tensor"
    )


def _check_decoder(decoder: str) -> None:
    if decoder not in DECODERS:
        raise ImageError(f"unknown decoder {decoder!r}; known: {', '.join(DECODERS)}")


def _check_tensor(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8:
        raise ImageError(f"pixels must be uint8, 0 to 255, not {str(pixels.dtype).removeprefix('torch.')}")
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(f"a tensor must be uint8 [3, h, w] in RGB order, not {list(pixels.shape)}")
    if 0 in pixels.shape:
        raise ImageError(f"the image has no pixels: {pixels.shape[2]} x {pixels.shape[1]}")
    return pixels


def _decoded(data: bytes, decoder: str, upright: bool) -> DecodedImage:
    if decoder == "fast-dct" and data.startswith(b"\xff\xd8\xff"):
        pixels = _fast_dct_pixels(data)
        if not upright:
            return DecodedImage(pixels, "fast-dct")
        with _opened(data) as header:
            orientation = _orientation(header)
        return _turned(pixels, "fast-dct", orientation)
    array, orientation = _pillow_decoded(data, upright)
    return _turned(_channels_first(array), "pillow", orientation)


def _pillow_decoded(data: bytes, upright: bool) -> tuple[np.ndarray, int]:
    """(uint8 [h, w, 3], EXIF orientation). On return Pillow's own pixels, four bytes each, are freed."""
    with _opened(data) as image:
        return _pillow_array(image), _orientation(image) if upright else 1


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """``data`` opened by Pillow. Errors inside become :class:`ImageError`, except MemoryError.

    Use only Pillow inside: its decoders raise any type of error on damaged files.
    """
    pillow = _require("PIL.Image", "Pillow")
    try:
        # Its warnings are about metadata, and about many pixels, which _check_size limits.
        with (
            _WARNINGS.ignored(),
            _silent_libtiff(pillow, data),
            pillow.open(io.BytesIO(data), formats=tuple(FORMATS)) as image,
        ):
            _check_size(*image.size)
            yield image
    except (ImageError, MemoryError):
        raise
    except pillow.DecompressionBombError:  # above twice its limit Pillow does not give the size
        raise _too_large("far") from None
    except pillow.UnidentifiedImageError:
        raise ImageError(
            f"not an image in a supported format ({', '.join(FORMATS)}); convert it to JPEG or PNG"
        ) from None
    except Exception as error:
        raise _unreadable("image", error) from None


class _Warnings:
    """Python's warnings, ignored while any thread is inside.

    ``catch_warnings`` of several threads would restore the filters of each other, and so ignore for ever.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught = ExitStack()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._caught.close()


_WARNINGS = _Warnings()

#: Held while libtiff's handlers are changed, so that two threads do not restore each other's.
_LIBTIFF = threading.Lock()


@contextmanager
def _silent_libtiff(pillow: Any, data: bytes) -> Iterator[None]:
    """Keep libtiff from writing its own lines to the C library's stderr, beside the one sentence of an error.

    Pillow decodes compressed TIFFs with libtiff and has no option for this. libtiff is told to call no
    handler, then given its former ones back. Redirecting file descriptor 2 would also lose what other threads
    write. Where Pillow's build hides libtiff's functions, nothing is done.
    """
    place = getattr(pillow.core, "__file__", None)
    if place is None or not data.startswith((b"II", b"MM")):  # TIFF's byte orders
        yield
        return
    library = ctypes.CDLL(
        place
    )  # it is loaded already; its symbols include those of libraries it is linked to
    setters = [getattr(library, f"TIFFSet{kind}Handler", None) for kind in ("Error", "Warning")]
    known = [setter for setter in setters if setter is not None]
    for setter in known:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    with _LIBTIFF:
        former = [setter(None) for setter in known]
        try:
            yield
        finally:
            for setter, handler in zip(known, former, strict=True):
                setter(handler)


def _unreadable(what: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ImageError(
        f"not a readable {what}: {reason}; fetch the file again, or save it again from a viewer"
    )


def read_image_file(path: Path) -> bytes:
    """The content of an image file. Raises :class:`ImageError` if it is missing or too large for an image."""
    try:
        check_regular(path)  # reading a pipe might never end
        if os.stat(path).st_size > MOST_BYTES:
            raise ImageError(f"the file has more than {MOST_BYTES:,} bytes; is it an image?")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read the file: {error.strerror or error}") from None
    except ValueError as error:  # a name that a file cannot have
        raise ImageError(f"cannot read the file: {error}") from None


def _check_size(width: int, height: int) -> None:
    """Call this before decoding: a few kilobytes may claim gigabytes of pixels."""
    if width * height > MOST_PIXELS:
        raise _too_large(f"{width} x {height},")


def _too_large(claim: str) -> ImageError:
    return ImageError(f"its header claims {claim} more than {MOST_PIXELS:,} pixels; make it smaller first")


def stored_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header, before any EXIF rotation.

    Raises :class:`ImageError`.
    """
    with _opened(data) as image:
        return image.height, image.width


# EXIF orientation → the axes of [3, h, w] to swap, then those to flip.
_ORIENTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
_EXIF_ORIENTATION = 0x0112


def _orientation(header: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or another value."""
    orientation = header.getexif().get(_EXIF_ORIENTATION)
    return int(orientation) if orientation in _ORIENTATIONS else 1


def _turned(pixels: Tensor, decoder: str, orientation: int) -> DecodedImage:
    """``pixels`` with the EXIF ``orientation`` applied."""
    if orientation == 1:
        return DecodedImage(pixels, decoder)
    swapped, flipped = _ORIENTATIONS[orientation]
    turned = pixels.transpose(1, 2) if swapped else pixels
    return DecodedImage(turned.flip(flipped).contiguous(), decoder, orientation)


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImageError(f"reading this image needs the package {package}: pip install {package}") from None


def _fast_dct_pixels(jpeg: bytes) -> Tensor:
    """JPEG bytes → uint8 [3, h, w], equal to ``tf.io.decode_jpeg(jpeg, channels=3)``."""
    simplejpeg: ModuleType = _require("simplejpeg", "simplejpeg")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        _check_size(width, height)
        inks = colours in ("CMYK", "YCCK")
        array = simplejpeg.decode_jpeg(jpeg, "CMYK" if inks else "RGB", fastdct=True)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable("JPEG file", error) from None
    if inks:
        with _opened(jpeg) as header:
            inverted = "adobe" in header.info
        array = _cmyk_to_rgb(array, inverted)
    return _channels_first(array)


def _pillow_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of any 8- or 16-bit mode → uint8 [h, w, 3]."""
    image.load()  # raises errors of decoding here: some versions of NumPy hide those that they meet
    if image.mode == "CMYK":
        # Pillow inverts the inks of every CMYK JPEG, but only files with an Adobe marker store them inverted.
        inverted = image.format in ("JPEG", "MPO") and "adobe" not in image.info
        return _cmyk_to_rgb(np.asarray(image), inverted)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # the high byte, as TensorFlow reads 16-bit PNG
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError(f"Pillow mode {image.mode} (32 bits) has no known value range; convert to RGB")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _cmyk_to_rgb(inks: np.ndarray, inverted: bool) -> np.ndarray:
    """uint8 [h, w, 4] → uint8 [h, w, 3]. ``inverted``: 255 means no ink, as Adobe writes it."""
    light = (inks if inverted else 255 - inks).astype(np.uint16)
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)


def _channels_first(pixels: np.ndarray) -> Tensor:
    # Copied first: tensors allow neither Pillow's read-only arrays nor a caller's negative strides.
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
