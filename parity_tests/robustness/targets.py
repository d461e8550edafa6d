"""Every reader of files from users: the sample that it reads, and how it is called."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parity_tests.helpers.paths import TOOLS
from parity_tests.robustness import damage
from parity_tests.robustness.samples import (
    CONFIG,
    HPARAMS,
    LABEL_MAP,
    LABELS,
    LABELS_JSON,
    LABELS_YAML,
    METRICS,
    YAML,
    bundle,
    coco,
    evaluate,
    frozen_graph,
    image,
    kept_results,
    keras_h5,
    object_based,
    pipeline,
    release,
    saved_model,
    sharded,
    snappy_index,
    tar_archive,
    text,
    tflite,
    video,
    weights,
    zip_archive,
    zipped_graph,
)
from pytorch_model.config import EfficientDetConfig

if TYPE_CHECKING:
    pass

sys.path.insert(0, str(TOOLS))


@dataclass(frozen=True)
class Target:
    """A reader with its sample.

    ``make(folder)`` writes the sample and returns the path to read. ``use(path)`` reads it as a command would
    and digests the result. ``vouched``: the format has checksums over all bytes that matter, so damage that
    is not rejected must change nothing. ``text``: half of the damage is done to whole words, which gets
    further than a stray byte. ``unpacked(path)``: the number of bytes that the file, as damaged, claims to
    hold.
    """

    name: str
    make: Callable[[Path], Path]
    use: Callable[[Path], str]
    vouched: bool
    text: bool = False
    damaged: str = "*"  # which of the files
    seal: Callable[[Path, random.Random], None] | None = None  # damages the folder's files behind checksums
    unpacked: Callable[[Path], int] = lambda path: 0


def convert_checkpoint(path: Path) -> str:
    """Open the checkpoint, infer its configuration, port it."""
    from porting.checkpoint import open_checkpoint
    from porting.convert import convert
    from porting.infer import infer_config

    with open_checkpoint(path) as checkpoint:
        config = infer_config(checkpoint.shapes, "", settings=checkpoint.settings).config
        conversion = convert(checkpoint, config)
    return digest(config, {key: tensor.numpy() for key, tensor in conversion.state_dict.items()})


def read_entries(path: Path) -> str:
    from porting.checkpoint.v2.index import read_index

    return repr(read_index(path).entries)


def load_weights(path: Path) -> str:
    from pytorch_model import load_model

    model = load_model(path)
    return digest(model.config, {key: tensor.numpy() for key, tensor in model.state_dict().items()})


def read_hparams(path: Path) -> str:
    from porting.hparams import read_hparams

    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return "not text"  # the shell would not pass it on either
    return repr(read_hparams(text))


def read_yaml(path: Path) -> str:
    from porting.hparams import read_hparams

    return repr(read_hparams(str(path)))


def read_pipeline(path: Path) -> str:
    from porting.checkpoint.objects.pipeline_config import read_pipeline

    return repr(read_pipeline(path))


def read_coco(path: Path) -> str:
    from pytorch_model.evaluation.classes import class_to_category
    from pytorch_model.evaluation.dataset import read_dataset
    from pytorch_model.evaluation.figures import evaluate

    dataset = read_dataset(path)
    mapping = class_to_category(dataset, 90, None)
    detections = [
        {"image_id": picture.id, "category_id": min(dataset.categories), "bbox": [1, 1, 9, 9], "score": 0.5}
        for picture in dataset.images
    ]
    evaluation = None
    if dataset.has_ground_truth:
        evaluation = evaluate(dataset.content, detections, [image.id for image in dataset.images])
    return repr((sorted(mapping.items()), evaluation))


def pixel_bytes(path: Path) -> int:
    """The size as float32 RGB of the pixels that the header states and that are read."""
    from PIL import Image

    from pytorch_model.detection.preprocess import MOST_PIXELS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return 12 * min(picture.width * picture.height, MOST_PIXELS)
    except Exception:  # damaged; then only the size of the file counts
        return 0


def read_labels(path: Path) -> str:
    from pytorch_model.detection.labels import find_names

    return repr(find_names(path, 5))


def read_metrics(path: Path) -> str:
    """To the card of the release that they belong to."""
    from pytorch_model.evaluation.metrics import Metrics, read_metrics

    metrics = Metrics.parse(read_metrics(path))
    return repr((metrics.figures, metrics.images, metrics.settings))


def resume(path: Path) -> str:
    """The result of an evaluation that resumes from the kept results; it must equal an undisturbed one."""
    with tempfile.TemporaryDirectory() as copy:  # resuming writes
        shutil.copytree(path / "shards", Path(copy) / "shards")
        return repr(evaluate(path, Path(copy) / "shards")[0])


def decode_image(path: Path) -> str:
    from pytorch_model.detection.preprocess import preprocess

    batch = preprocess([path], CONFIG, (64, 64), "pillow")
    return hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()


def decode_fast(path: Path) -> str:
    from pytorch_model.detection.preprocess import preprocess

    batch = preprocess([path], CONFIG, (64, 64), "fast-dct")
    return hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()


def decode_upright(path: Path) -> str:
    """As for detection: turned according to the EXIF orientation."""
    return _upright(path, "pillow")


def decode_upright_fast(path: Path) -> str:
    return _upright(path, "fast-dct")


def _upright(path: Path, decoder: str) -> str:
    from pytorch_model.detection.preprocess import load_image

    image = load_image(path, decoder, upright=True)
    content = hashlib.sha256(f"{image.orientation} {tuple(image.pixels.shape)}".encode())
    content.update(image.pixels.numpy().tobytes())
    return content.hexdigest()


def read_video(path: Path) -> str:
    """Its frames and their times."""
    from pytorch_model.detection.video import VideoReader

    frames = hashlib.sha256()
    with VideoReader(path) as reader:
        for frame in reader:
            frames.update(f"{frame.number} {frame.time} {tuple(frame.pixels.shape)}".encode())
            frames.update(frame.pixels.numpy().tobytes())
        frames.update(f"{reader.rate} {reader.time_base}".encode())
    return frames.hexdigest()


def digest(config: EfficientDetConfig, arrays: Mapping[str, np.ndarray]) -> str:
    content = hashlib.sha256(repr(config).encode())
    for key, array in sorted(arrays.items()):
        content.update(f"{key} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


TARGETS = {
    target.name: target
    for target in (
        Target("bundle", bundle, convert_checkpoint, vouched=True),
        Target("sharded bundle", sharded, convert_checkpoint, vouched=True),
        Target("object-based", object_based, convert_checkpoint, vouched=True),
        Target("sealed index", bundle, convert_checkpoint, vouched=False, seal=damage.sealed_index),
        Target("sealed snappy", snappy_index, read_entries, vouched=False, seal=damage.sealed_blocks),
        Target(
            "sealed graph", object_based, convert_checkpoint, vouched=False, seal=damage.sealed_object_graph
        ),
        Target("sealed zip", zipped_graph, convert_checkpoint, vouched=False, seal=damage.sealed_zip_member),
        Target("tar.gz", tar_archive, convert_checkpoint, vouched=True),
        Target("zip", zip_archive, convert_checkpoint, vouched=True),
        Target("SavedModel", saved_model, convert_checkpoint, vouched=True),
        Target("frozen graph", frozen_graph, convert_checkpoint, vouched=False),
        Target("h5", keras_h5, convert_checkpoint, vouched=False),
        Target("tflite float32", tflite("float32"), convert_checkpoint, vouched=False),
        Target("tflite int8", tflite("int8"), convert_checkpoint, vouched=False),
        Target("safetensors", weights(".safetensors"), load_weights, vouched=True),
        Target("pth", weights(".pth"), load_weights, vouched=True),
        Target("release", release, load_weights, vouched=True, damaged="*.pth"),
        Target("config.json", release, load_weights, vouched=False, text=True, damaged="*.json"),
        Target("hparams text", text("hparams.txt", HPARAMS), read_hparams, vouched=False, text=True),
        Target("hparams yaml", text("hparams.yaml", YAML), read_yaml, vouched=False, text=True),
        Target("pipeline.config", pipeline, read_pipeline, vouched=False, text=True),
        Target("COCO json", coco, read_coco, vouched=False, text=True, damaged="*.json"),
        Target("kept results", kept_results, resume, vouched=True, text=True, damaged="*.jsonl"),
        Target("labels", text("labels.txt", LABELS), read_labels, vouched=False, text=True),
        Target("labels json", text("l.json", json.dumps(LABELS_JSON)), read_labels, vouched=False, text=True),
        Target("labels yaml", text("l.yaml", LABELS_YAML), read_labels, vouched=False, text=True),
        Target("label map", text("l.pbtxt", LABEL_MAP), read_labels, vouched=False, text=True),
        Target("COCO metrics", text("m.json", json.dumps(METRICS)), read_metrics, vouched=False, text=True),
        *(
            Target(name, make, use, vouched=False, unpacked=pixel_bytes)
            for name, make, use in (
                ("JPEG", image("picture.jpg"), decode_image),
                ("JPEG by the fast DCT", image("picture.jpg"), decode_fast),
                ("PNG", image("picture.png"), decode_image),
                ("JPEG upright", image("picture.jpg", turned=True), decode_upright),
                ("JPEG by the fast DCT upright", image("picture.jpg", turned=True), decode_upright_fast),
                ("PNG upright", image("picture.png", turned=True), decode_upright),
                ("WebP", image("picture.webp", turned=True), decode_upright),
                ("TIFF", image("picture.tif", turned=True), decode_upright),
                ("TIFF by LZW", image("picture.tif", turned=True, compression="tiff_lzw"), decode_upright),
                ("BMP", image("picture.bmp"), decode_upright),
                ("GIF", image("picture.gif"), decode_upright),
            )
        ),
        Target("MP4", video("clip.mp4"), read_video, vouched=False),
        Target("Matroska", video("clip.mkv"), read_video, vouched=False),
    )
}
