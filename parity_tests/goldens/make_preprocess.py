"""Images as TensorFlow decodes and prepares them: ``python parity_tests/goldens/make_preprocess.py``."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import GOLDEN_TARGETS, tensorflow_preprocess
from porting.synthetic import synthetic_image
from pytorch_model.config import model_config


def jpegs() -> dict[str, bytes]:
    """One file of every kind that decoders treat differently."""
    picture = Image.fromarray(synthetic_image(41, 59))
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90 degrees: decoders that apply it return a different shape

    def encode(image: Image.Image, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85, **options)
        return buffer.getvalue()

    cmyk = encode(picture.convert("CMYK"))
    marker = cmyk.index(b"\xff\xee")  # Adobe's, 16 bytes; its last byte is the colour transform
    return {
        "420": encode(picture, subsampling="4:2:0"),
        "422": encode(picture, subsampling="4:2:2"),
        "444": encode(picture, subsampling="4:4:4"),
        "progressive": encode(picture, progressive=True),
        "grey": encode(picture.convert("L")),
        "cmyk": cmyk,
        "cmyk_plain": cmyk[:marker] + cmyk[marker + 16 :],
        "ycck": cmyk[: marker + 15] + b"\x02" + cmyk[marker + 16 :],
        "rotated": encode(picture, exif=exif),
    }


def main() -> None:
    import tensorflow as tf

    arrays: dict[str, Any] = {}
    for kind, data in jpegs().items():
        arrays[f"{kind}/jpeg"] = np.frombuffer(data, np.uint8)
        arrays[f"{kind}/fast"] = tf.io.decode_jpeg(data, channels=3).numpy()
        accurate = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        arrays[f"{kind}/accurate"] = accurate
    for model, target in GOLDEN_TARGETS:
        config = model_config(f"efficientdet-{model}")
        key = f"input/{model}/{target[0]}x{target[1]}"
        arrays[key] = tensorflow_preprocess(tf, arrays["420/accurate"], config, target)
    np.savez_compressed(GOLDENS / "preprocess.npz", **arrays)


if __name__ == "__main__":
    main()
