"""Preprocessing, compared bit for bit with Google's recordings and TensorFlow's operations."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import GOLDEN_TARGETS, tensorflow_preprocess
from pytorch_model.config import Resizer, model_config
from pytorch_model.detection.preprocess import (
    ImageError,
    ImageSource,
    load_image,
    preprocess,
    scaled,
)
from pytorch_model.detection.resizing.tensors import resize_bilinear
from pytorch_model.detection.settings import DECODERS, FORMATS

D0, LITE0 = model_config("efficientdet-d0"), model_config("efficientdet-lite0")

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def needs(decoder: str) -> None:
    if decoder == "fast-dct":
        pytest.importorskip("simplejpeg", reason="needs simplejpeg for the fast DCT")


def nhwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


# --- recordings ---------------------------------------------------------------------------------------


def recorded_cases() -> list[Any]:
    sizes = ["128", "256", "320", "512", "640", "896", "1024", "1536", "384x640_hw"]
    keys = [f"d/{size}" for size in sizes] + [f"lite/{size}" for size in ("128", "320", "512")]
    return [pytest.param(name, key) for name in ("img1.jpg", "street.jpg") for key in keys]


@pytest.mark.parametrize(("name", "key"), recorded_cases())
def test_recorded_arrays_bit_for_bit(shared: Path, name: str, key: str) -> None:
    """Google's evaluation preprocessing of two photographs, read with Pillow."""
    kind, size = key.split("/")
    target = (384, 640) if size == "384x640_hw" else (int(size), int(size))
    found = preprocess([shared / "images" / name], LITE0 if kind == "lite" else D0, target)
    with np.load(shared / "oracle/preproc/preproc.npz") as stored:
        stats = json.loads(bytes(stored["__stats_json__"]))[f"{name}/{key}"]
        expected = stored[f"{name}/{key}" if stats["stride"] == 1 else f"{name}/{key}@strided"]
        scale = stored[f"{name}/{key}/scale"]
    ours = nhwc(found.images)
    np.testing.assert_array_equal(ours.reshape(-1)[:: stats["stride"]], expected.reshape(-1))
    assert ours.shape[1:] == tuple(stats["shape"])
    assert abs(ours.sum(dtype=np.float64) - stats["sum"]) < 1e-6 * ours.size  # the elements not recorded
    assert found.image_scales.tolist() == [[scale[1], scale[1]]]  # AutoML has one scale for both axes
    assert found.decoders == ("pillow",)


def test_the_default_decode_of_tensorflow_bit_for_bit(shared: Path) -> None:
    """The recorded input of the released Lite0, which TensorFlow decoded with its fast DCT."""
    needs("fast-dct")
    with np.load(shared / "lite0/activations_2images.npz") as stored:
        files = [shared / f"coco/val2017/{number:012d}.jpg" for number in stored["image_ids"]]
        found = preprocess(files, LITE0, decoder="fast-dct")
        np.testing.assert_array_equal(nhwc(found.images), stored["input"])
        both_axes = np.stack([stored["image_scale"]] * 2, axis=1)
        np.testing.assert_array_equal(found.image_scales.numpy(), both_axes)
    assert found.decoders == ("fast-dct", "fast-dct")
    # Pillow's accurate DCT is seen, so the two are not confused.
    assert not np.array_equal(nhwc(preprocess(files, LITE0).images), nhwc(found.images))


def golden(key: str) -> np.ndarray:
    with np.load(GOLDENS / "preprocess.npz") as stored:
        values: np.ndarray = stored[key]
    return values


@pytest.mark.parametrize(("model", "target"), GOLDEN_TARGETS)
def test_golden_inputs_bit_for_bit(model: str, target: tuple[int, int]) -> None:
    config = {"d0": D0, "lite0": LITE0}[model]
    found = preprocess([golden("420/accurate")], config, target)
    np.testing.assert_array_equal(nhwc(found.images)[0], golden(f"input/{model}/{target[0]}x{target[1]}"))


JPEG_KINDS = ("420", "422", "444", "progressive", "grey", "cmyk", "cmyk_plain", "ycck", "rotated")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_golden_decoding_bit_for_bit(kind: str, decoder: str, tmp_path: Path) -> None:
    """Small files of every kind, as ``tf.io.decode_jpeg(channels=3)`` read them with either DCT."""
    needs(decoder)
    file = tmp_path / "image.jpg"
    file.write_bytes(bytes(golden(f"{kind}/jpeg")))
    found = load_image(file, decoder)
    expected = golden(f"{kind}/{'fast' if decoder == 'fast-dct' else 'accurate'}")
    np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
    assert found.decoder == decoder


def test_the_goldens_distinguish_the_decoders() -> None:
    for kind in JPEG_KINDS:
        assert not np.array_equal(golden(f"{kind}/fast"), golden(f"{kind}/accurate"))


# --- TensorFlow itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoding_158_photographs_is_tensorflows(shared: Path, tensorflow: Any, decoder: str) -> None:
    needs(decoder)
    method = "INTEGER_FAST" if decoder == "fast-dct" else "INTEGER_ACCURATE"
    files = sorted((shared / "coco/val2017").glob("*.jpg"))
    assert len(files) == 158
    for file in files:
        data = file.read_bytes()
        expected = tensorflow.io.decode_jpeg(data, channels=3, dct_method=method).numpy()
        pixels = load_image(file, decoder).pixels.permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, expected, err_msg=file.name)
        if decoder == "fast-dct":  # and that is the default
            np.testing.assert_array_equal(tensorflow.io.decode_jpeg(data, channels=3).numpy(), expected)


def png_images() -> list[Any]:
    rng = np.random.default_rng(3)
    rgba = rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    wide = rng.integers(0, 65536, (9, 7)).astype(np.uint16)
    return [
        pytest.param(Image.fromarray(rgba[..., :3]), id="RGB"),
        pytest.param(Image.fromarray(rgba), id="RGBA"),
        pytest.param(Image.fromarray(rgba[..., 0]), id="L"),
        pytest.param(Image.fromarray(rgba[..., 0]).point(lambda v: 255 * (v > 99), "1"), id="1"),
        pytest.param(Image.fromarray(rgba).convert("LA"), id="LA"),
        pytest.param(Image.fromarray(rgba[..., :3]).quantize(16), id="P"),
        pytest.param(Image.fromarray(wide), id="I;16"),
    ]


@pytest.mark.parametrize("image", png_images())
@pytest.mark.parametrize("decoder", DECODERS)
def test_png_of_every_mode_is_tensorflows(image: Any, decoder: str, tensorflow: Any, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    image.save(file)
    expected = tensorflow.io.decode_image(file.read_bytes(), channels=3).numpy()
    found = load_image(file, decoder)
    np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
    assert found.decoder == "pillow"


sides = st.integers(1, 90)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**31))
def test_resizing_is_tensorflows(
    tensorflow: Any, height: int, width: int, new_height: int, new_width: int, seed: int
) -> None:
    image = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    expected = tensorflow.image.resize(image, (new_height, new_width), method="bilinear").numpy()
    found = resize_bilinear(torch.from_numpy(image).permute(2, 0, 1), (new_height, new_width))
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 80), st.integers(8, 80), st.integers(16, 96), st.integers(16, 96), st.integers(0, 2**31)
)
def test_the_whole_preprocessing_is_tensorflows(
    tensorflow: Any, height: int, width: int, target_height: int, target_width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = (target_height, target_width)
    expected = tensorflow_preprocess(tensorflow, pixels, D0, target)
    np.testing.assert_array_equal(nhwc(preprocess([pixels], D0, target).images)[0], expected)


def test_recorded_quirks() -> None:
    """``quirks.json``: 8 pixels to 3, and 3 to 5."""
    row = torch.arange(8.0)
    expected = np.array([0.8333333730697632, 3.5, 6.1666669845581055], np.float32)
    np.testing.assert_array_equal(resize_bilinear(row[None], (1, 3))[0].numpy(), expected)
    expected = np.array([0.0, 0.40000003576278687, 1.0, 1.6000001430511475, 2.0], np.float32)
    np.testing.assert_array_equal(resize_bilinear(row[None, :3], (1, 5))[0].numpy(), expected)


# --- any source, any size -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 1600), st.integers(16, 1600))
def test_scaled_images_fit_and_fill(height: int, width: int, target_height: int, target_width: int) -> None:
    target = (target_height, target_width)
    try:
        (scaled_height, scaled_width), scales = scaled((height, width), target, Resizer())
    except ImageError:
        ratio = min(target_height / height, target_width / width)
        assert min(height * ratio, width * ratio) < 1.001
        return
    assert scaled_height <= target_height
    assert scaled_width <= target_width
    # Truncation may lose the last pixel even of the side that decides the scale.
    assert target_height - scaled_height <= 1 or target_width - scaled_width <= 1
    assert scales.dtype == np.float32
    assert scales[0] == scales[1]


def picture(height: int = 30, width: int = 50) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    pixels = picture()
    file = tmp_path / "image.png"
    Image.fromarray(pixels).save(file)
    flipped_twice = pixels[:, ::-1].copy()[:, ::-1]  # negative strides
    read_only = pixels.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources: list[ImageSource] = [
        file,
        str(file),
        file.read_bytes(),
        Image.open(file),
        Image.fromarray(pixels),
        pixels,
        flipped_twice,
        read_only,
        tensor,
        tensor.contiguous(),
    ]
    found = preprocess(sources, D0, (64, 64))
    for image in found.images[1:]:
        assert torch.equal(image, found.images[0])
    assert found.decoders == ("pillow",) * 5 + ("none",) * 5
    batch = preprocess(torch.stack([tensor] * 3), D0, (64, 64))
    assert torch.equal(batch.images, found.images[:3])
    assert torch.equal(batch.image_scales, found.image_scales[:3])


def test_images_of_several_sizes_make_one_batch() -> None:
    images = [picture(30, 50), picture(200, 100), picture(64, 64)]
    batch = preprocess(images, LITE0, (64, 96))
    assert batch.images.shape == (3, 3, 64, 96)
    for index, image in enumerate(images):
        alone = preprocess([image], LITE0, (64, 96))
        assert torch.equal(alone.images[0], batch.images[index])
        assert torch.equal(alone.image_scales[0], batch.image_scales[index])
    # 30 x 50 becomes 57 x 96: seven rows of padding, zero after normalisation.
    assert (batch.images[0, :, 57:] == 0).all()
    assert (batch.images[0, :, :57].abs().sum(dim=0) > 0).all()


def test_the_configuration_decides_size_and_normalisation() -> None:
    grey = np.full((10, 10, 3), 127, np.uint8)
    assert (preprocess([grey], LITE0).images == 0).all()
    advprop = LITE0.replace(mean_rgb=(127.5,) * 3, stddev_rgb=(127.5,) * 3, image_size=(64, 32))
    extremes = preprocess([np.array([[[0] * 3, [255] * 3]], np.uint8)], advprop, (1, 2)).images
    assert extremes[0, 0].tolist() == [[-1.0, 1.0]]
    assert preprocess([grey], advprop).images.shape == (1, 3, 64, 32)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(picture(20, 40)).save(tmp_path / "rotated.jpg", exif=exif)
    assert load_image(tmp_path / "rotated.jpg").pixels.shape == (3, 20, 40)


# --- rejections -----------------------------------------------------------------------------------------

BAD_IMAGES = [
    pytest.param("missing.jpg", "missing.jpg: cannot read the file: No such file", id="missing"),
    pytest.param(np.zeros((4, 4, 3), np.float32), "number 1: pixels must be uint8", id="float array"),
    pytest.param(np.zeros((4, 4), np.uint8), r"array must be uint8 \[h, w, 3\]", id="flat array"),
    pytest.param(np.zeros((4, 4, 4), np.uint8), r"array must be uint8 \[h, w, 3\]", id="four channels"),
    pytest.param(np.zeros((0, 4, 3), np.uint8), "no pixels", id="empty array"),
    pytest.param(torch.zeros(4, 4, 3, dtype=torch.uint8), r"tensor must be uint8 \[3, h, w\]", id="nhwc"),
    pytest.param(torch.zeros(3, 4, 4), "not float32", id="float tensor"),
    pytest.param(np.zeros((1, 4000, 3), np.uint8), "number 1: 4000 x 1 pixels is too long", id="thin"),
    pytest.param(7, "int is not an image", id="number"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES)
def test_bad_images_are_rejected_by_name(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        preprocess([picture(), image], D0, (64, 64))
    assert "\n" not in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG file whose header claims this many pixels, and which holds few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    data = bytearray(out.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("header", [png_header, jpeg_header])
@pytest.mark.parametrize(
    "side", [11_586, 13_000, 65_500]
)  # Pillow warns about the first two, and rejects the third
@pytest.mark.parametrize("decoder", DECODERS)
def test_decompression_bombs_are_rejected(
    decoder: str, side: int, header: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A small file whose header claims up to 65,500 × 65,500 pixels, 12.9 GB once decoded."""
    needs(decoder)
    (tmp_path / "bomb").write_bytes(header(side, side))
    with pytest.raises(ImageError, match=r"more than 134,217,728 pixels; make it smaller first"):
        load_image(tmp_path / "bomb", decoder)
    assert not recwarn.list


def test_a_too_large_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr("pytorch_model.detection.preprocess.MOST_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_panorama_is_read(kind: str, decoder: str, tmp_path: Path) -> None:
    needs(decoder)
    Image.new("RGB", (20_000, 2_000), (9, 99, 199)).save(tmp_path / "wide", kind)
    assert load_image(tmp_path / "wide", decoder).pixels.shape == (3, 2_000, 20_000)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_phones_108_million_pixels_are_read(
    decoder: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """More than Pillow's warning limit; in grey, which takes the least memory here."""
    needs(decoder)
    Image.new("L", (12_000, 9_000), 99).save(tmp_path / "large.jpg")
    read = load_image(tmp_path / "large.jpg", decoder)
    assert (read.pixels.shape, read.decoder) == ((3, 9_000, 12_000), decoder)
    assert read.pixels[:, -1, -1].tolist() == [99, 99, 99]
    assert not recwarn.list


@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_files_are_rejected(decoder: str, tmp_path: Path) -> None:
    needs(decoder)
    jpeg = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(jpeg, "JPEG")
    for name, content in {
        "empty.jpg": b"",
        "text.jpg": b"no image at all",
        "header.jpg": jpeg.getvalue()[:30],
        "half.jpg": jpeg.getvalue()[:900],
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(ImageError, match=name) as caught:
            preprocess([file], D0, decoder=decoder)
        assert "\n" not in str(caught.value)
    # A list of images may hold any text, also names that a file cannot have.
    for path in (tmp_path, tmp_path / "nul\0.jpg", tmp_path / "\ud800.jpg"):
        with pytest.raises(ImageError, match="cannot read the file"):
            load_image(path, decoder)


def saved(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [Image.new("RGB", (56, 40))]}
    Image.fromarray(picture(40, 56)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_format_is_read(kind: str, decoder: str, tmp_path: Path) -> None:
    needs(decoder)
    (tmp_path / "picture").write_bytes(saved(kind, lossless=True))
    found = load_image(tmp_path / "picture", decoder, upright=True)
    with Image.open(tmp_path / "picture") as image:
        assert image.format == kind
        expected = np.asarray(image.convert("RGB"))
    if found.decoder == "pillow":
        np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
    assert found.decoder == (decoder if kind in ("JPEG", "MPO") else "pillow")


@pytest.mark.parametrize("decoder", DECODERS)
def test_other_formats_are_rejected(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also formats that Pillow reads; it reads some of them by starting another program."""
    needs(decoder)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tried = 0
    for kind in ("EPS", "PCX", "PPM", "TGA", "ICO", "DDS", "SGI", "JPEG2000", "AVIF", "PDF", "MSP"):
        try:
            content = saved(kind)
        except (KeyError, OSError):  # not in this Pillow
            continue
        tried += 1
        (tmp_path / "a.jpg").write_bytes(content)
        message = r"not an image in a supported format \(JPEG, PNG, .*\); convert it to JPEG or PNG"
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / "a.jpg", decoder, upright=True)
    assert tried > 8
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "error", [NotImplementedError("BC8"), RuntimeError("avif\nfailed"), TypeError(), KeyError(3)]
)
@pytest.mark.parametrize("place", ["PIL.ImageFile.ImageFile.load", "PIL.Image.Image.getexif"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_error_of_pillow_names_the_image(
    error: Exception, place: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    needs(decoder)
    (tmp_path / "a.jpg").write_bytes(saved("JPEG" if place.endswith("getexif") else "PNG"))
    monkeypatch.setattr(place, fail)
    message = r"not a readable image: (BC8|avif failed|TypeError|3); fetch the file again, or save it again"
    with pytest.raises(ImageError, match=message):
        load_image(tmp_path / "a.jpg", decoder, upright=True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_lack_of_memory_does_not_blame_the_image(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    needs(decoder)
    (tmp_path / "a.jpg").write_bytes(saved("JPEG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    if decoder == "fast-dct":
        monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    with pytest.raises(MemoryError):
        load_image(tmp_path / "a.jpg", decoder)


@pytest.mark.parametrize("error", [RuntimeError("turbo"), TypeError("turbo")])
def test_every_error_of_the_fast_decoder_names_the_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    needs("fast-dct")
    (tmp_path / "a.jpg").write_bytes(saved("JPEG"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    with pytest.raises(ImageError, match="not a readable JPEG file: turbo; fetch the file again"):
        load_image(tmp_path / "a.jpg", "fast-dct")


def test_the_orientation_of_a_tiff_file_is_always_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "a.tif").write_bytes(saved("TIFF", exif=exif))
    for upright in (False, True):
        found = load_image(tmp_path / "a.tif", upright=upright)
        assert (found.pixels.shape, found.orientation) == ((3, 56, 40), 1)


def test_wrong_calls_are_rejected() -> None:
    with pytest.raises(ImageError, match="no images"):
        preprocess([], D0)
    with pytest.raises(ImageError, match="no images"):
        preprocess(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), D0)
    with pytest.raises(ImageError, match="not float32"):
        preprocess(torch.zeros(2, 3, 4, 4), D0)
    with pytest.raises(ImageError, match="number 0: 4000 x 1 pixels"):
        preprocess(torch.zeros(2, 3, 1, 4000, dtype=torch.uint8), D0)
    with pytest.raises(ImageError, match="must be a list"):
        preprocess("one.jpg", D0)
    with pytest.raises(ImageError, match="must be a list"):
        preprocess(torch.zeros(3, 4, 4, dtype=torch.uint8), D0)
    with pytest.raises(ImageError, match="unknown decoder 'turbo'"):
        preprocess([picture()], D0, decoder="turbo")
    with pytest.raises(ImageError, match="32 bits"):
        load_image(Image.new("F", (4, 4)))


def test_a_missing_decoder_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="pip install simplejpeg"):
        load_image(tmp_path / "a.jpg", "fast-dct")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_on_request(tmp_path: Path, orientation: int) -> None:
    """Like Pillow, with either decoder; ignored by default."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    rng = np.random.default_rng(0)
    file = tmp_path / "turned.jpg"
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(file, exif=exif)
    with Image.open(file) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
        from_pillow = load_image(picture, upright=True)
    for found in (load_image(file, upright=True), from_pillow):
        np.testing.assert_array_equal(found.pixels.permute(1, 2, 0).numpy(), expected)
        assert found.orientation == orientation
    assert load_image(file).pixels.shape == (3, 40, 56)
    pytest.importorskip("simplejpeg", reason="needs simplejpeg for the fast DCT")
    fast = load_image(file, "fast-dct", upright=True)
    assert fast.pixels.permute(1, 2, 0).shape == expected.shape
    # The fast DCT is up to 23 grey levels off; a wrong turn of noise is 85 off on average.
    assert np.abs(fast.pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 10


# --- libtiff ------------------------------------------------------------------------------------------


COMPRESSIONS = [
    "tiff_lzw",
    "tiff_adobe_deflate",
    "packbits",
    "jpeg",
    "group3",
    "group4",
    "tiff_ccitt",
    "lzma",
    "zstd",
]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_libtiff_writes_nothing_beside_our_sentence(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff's own lines go to the C library's stderr; without care every one of these files has some."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    bilevel = compression in ("group3", "group4", "tiff_ccitt")
    sound = io.BytesIO()
    try:
        (image.convert("1") if bilevel else image).save(sound, "TIFF", compression=compression)
    except OSError:
        pytest.skip("this Pillow has no such compression")
    rng, path, refused = random.Random(0), tmp_path / "damaged.tif", 0
    for _ in range(60):
        damaged = bytearray(sound.getvalue())
        for _ in range(9):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_image(path)
        except ImageError:
            refused += 1
    assert refused
    assert capfd.readouterr().err == ""


def test_libtiffs_handlers_are_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What other code in the process decodes by Pillow is reported as before."""
    sound = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(sound, "TIFF", compression="tiff_adobe_deflate")
    damaged = bytearray(sound.getvalue())
    damaged[40:60] = bytes(20)  # in the only strip, which follows the header
    path = tmp_path / "damaged.tif"
    path.write_bytes(damaged)

    def lines() -> str:
        with suppress(OSError), Image.open(path) as image:
            image.load()
        return capfd.readouterr().err

    before = lines()
    assert before
    with pytest.raises(ImageError):
        load_image(path)
    assert capfd.readouterr().err == ""
    assert lines() == before
