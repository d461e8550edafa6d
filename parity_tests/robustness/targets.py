"""Everything that reads what a user brings: a small sound sample of each kind, and how it is used."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity_tests.helpers.object_trees import VALUE, automl_graph, automl_paths
from parity_tests.helpers.paths import GOLDENS, TOOLS
from parity_tests.helpers.tflite_files import TINY, golden, tiny_variables
from parity_tests.robustness import sealed
from pytorch_model.config import EfficientDetConfig

if TYPE_CHECKING:
    from pytorch_model.detection.detector import Detector
    from pytorch_model.evaluation.shards import Shards
    from pytorch_model.evaluation.streams import Outcome

sys.path.insert(0, str(TOOLS))


@dataclass(frozen=True)
class Target:
    """``make(folder)`` writes the sample and returns what the reader is pointed at; ``use(path)`` reads it
    as a command would and digests the result. ``vouched``: the format has checksums over all of its bytes
    that matter, so damage that is not refused must change nothing. ``text``: half of the damage is done to
    whole words, which gets deeper than a stray byte. ``unpacked(path)``: the bytes that the file, as damaged,
    says it holds."""

    name: str
    make: Callable[[Path], Path]
    use: Callable[[Path], str]
    vouched: bool
    text: bool = False
    damaged: str = "*"  # which of the files
    seal: Callable[[Path, random.Random], None] | None = None  # damages the folder's files behind checksums
    unpacked: Callable[[Path], int] = lambda path: 0


CONFIG = TINY.replace(fpn_cell_repeats=1, box_class_repeats=1)


@cache
def values() -> Mapping[str, np.ndarray]:
    return tiny_variables(CONFIG)


# --- using -----------------------------------------------------------------------------------------------


def convert_checkpoint(path: Path) -> str:
    """Open, find out what it is, port it."""
    from porting.checkpoint import open_checkpoint
    from porting.convert import convert
    from porting.infer import infer_config

    with open_checkpoint(path) as checkpoint:
        config = infer_config(checkpoint.shapes, "", settings=checkpoint.settings).config
        conversion = convert(checkpoint, config)
    return digest(config, {key: tensor.numpy() for key, tensor in conversion.state_dict.items()})


def read_entries(path: Path) -> str:
    from porting.checkpoint.v2.bundle import read_index

    return repr(read_index(path).entries)


def load_weights(path: Path) -> str:
    from pytorch_model.weights.files import load_model

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
    """Of float32 RGB, which the network is given, of as many pixels as the header says and are read."""
    from PIL import Image

    from pytorch_model.detection.preprocess import MOST_PIXELS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return 12 * min(picture.width * picture.height, MOST_PIXELS)
    except Exception:  # damaged; then nothing is worth more than the file
        return 0


def read_labels(path: Path) -> str:
    from pytorch_model.detection.labels import load_names

    return repr(load_names(path, 5))


def read_metrics(path: Path) -> str:
    """To the card of the release that they belong to."""
    from pytorch_model.evaluation.metrics import Metrics, read_metrics

    metrics = Metrics.parse(read_metrics(path))
    return repr((metrics.figures, metrics.images, metrics.settings))


def resume(path: Path) -> str:
    """What the evaluation finds that goes on from the results kept there: what an undisturbed one finds."""
    with tempfile.TemporaryDirectory() as copy:  # going on writes
        shutil.copytree(path / "shards", Path(copy) / "shards")
        return repr(evaluate(path, Path(copy) / "shards")[0])


def evaluate(pictures: Path, folder: Path) -> tuple[Outcome | None, Shards]:
    """As tools/eval_coco.py does, a picture a batch."""
    from pytorch_model.evaluation.dataset import read_dataset
    from pytorch_model.evaluation.processes import Processes
    from pytorch_model.evaluation.shards import Shards
    from pytorch_model.evaluation.streams import Stream, detect_dataset, settings

    dataset, detector, categories = read_dataset(pictures), small_detector(), {1: 1, 2: 18}
    shards = Shards(folder, "ours", settings(detector, dataset, 1, categories, "of a sample"))
    streams = [Stream("ours", None, shards)]
    outcome = detect_dataset(detector, dataset, streams, categories, 1, Processes(), lambda *_: None)
    return outcome, shards


@cache
def small_detector() -> Detector:
    import torch

    from pytorch_model.detection.detector import Detector
    from pytorch_model.detection.settings import NMSConfig
    from pytorch_model.efficientdet import EfficientDet

    torch.manual_seed(0)
    return Detector(EfficientDet(CONFIG), image_size=(64, 64), nms=NMSConfig(max_output_size=5))


def decode_image(path: Path) -> str:
    from pytorch_model.detection.preprocess import preprocess

    batch = preprocess([path], CONFIG, (64, 64), "pillow")
    return hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()


def decode_fast(path: Path) -> str:
    from pytorch_model.detection.preprocess import preprocess

    batch = preprocess([path], CONFIG, (64, 64), "fast-dct")
    return hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()


def decode_upright(path: Path) -> str:
    """As for detecting: turned as the EXIF orientation says."""
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


# --- samples ---------------------------------------------------------------------------------------------


def bundle(folder: Path) -> Path:
    from porting.checkpoint.v2.writer import write_bundle
    from porting.scopes import EMA_SUFFIX

    arrays = dict(values())
    arrays |= {name + EMA_SUFFIX: array + np.float32(0.5) for name, array in values().items()}
    write_bundle(folder / "model", {**arrays, "global_step": np.array(7, np.int64)})
    return folder


def sharded(folder: Path) -> Path:
    from porting.checkpoint.v2.writer import write_bundle

    write_bundle(folder / "model.ckpt-7", values(), num_shards=3)
    return folder


def object_based(folder: Path) -> Path:
    return with_graph(folder, automl_graph(CONFIG))


def with_graph(folder: Path, graph: bytes) -> Path:
    """An object graph is a string, which the project never writes: the entry is put together by hand."""
    import google_crc32c

    from porting.checkpoint import wire
    from porting.checkpoint.objects.graph import GRAPH_KEY
    from porting.checkpoint.v2.table import mask_crc, write_table
    from porting.checkpoint.v2.writer import _entry, _header

    paths = automl_paths(CONFIG)
    length = len(graph).to_bytes(4, "little")
    length_crc = mask_crc(google_crc32c.value(length)).to_bytes(4, "little")
    raw = wire.write_varint(len(graph)) + length_crc + graph
    crc = mask_crc(google_crc32c.value(length + length_crc + graph))
    shape = wire.bytes_field(2, b"")
    entries = {
        GRAPH_KEY.encode(): wire.int_field(1, 7)
        + shape
        + wire.int_field(5, len(raw))
        + wire.fixed32_field(6, crc)
    }
    data = bytearray(raw)
    for name, path in paths.items():
        entries[(path + VALUE).encode()] = _entry(values()[name], 0, len(data))
        data += values()[name].tobytes()
    table = write_table([(b"", _header(1)), *sorted(entries.items())])
    (folder / "ckpt-1.index").write_bytes(table)
    (folder / "ckpt-1.data-00000-of-00001").write_bytes(data)
    return folder


def tar_archive(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    bundle(inner)
    with tarfile.open(folder / "model.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(inner, "efficientdet-lite0")
    shutil.rmtree(inner)
    return folder / "model.tar.gz"


def zip_archive(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    bundle(inner)
    with zipfile.ZipFile(folder / "model.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(inner.iterdir()):
            archive.write(path, f"efficientdet-lite0/{path.name}")
    shutil.rmtree(inner)
    return folder / "model.zip"


def saved_model(folder: Path) -> Path:
    from porting.checkpoint.v2.writer import write_bundle

    write_bundle(folder / "variables" / "variables", values())
    (folder / "saved_model.pb").write_bytes(b"\x08\x01\x12\x00")
    return folder


def frozen_graph(folder: Path) -> Path:
    from porting.checkpoint import wire

    graph = b""
    for name, array in values().items():
        dimensions = b"".join(wire.bytes_field(2, wire.int_field(1, n)) for n in array.shape)
        tensor = wire.int_field(1, 1) + wire.bytes_field(2, dimensions) + wire.bytes_field(4, array.tobytes())
        value = wire.bytes_field(1, b"value") + wire.bytes_field(2, wire.bytes_field(8, tensor))
        node = wire.bytes_field(1, name.encode()) + wire.bytes_field(2, b"Const") + wire.bytes_field(5, value)
        graph += wire.bytes_field(1, node)
    (folder / "frozen.pb").write_bytes(graph)
    return folder / "frozen.pb"


def zipped_graph(folder: Path) -> Path:
    graph = frozen_graph(folder)
    with zipfile.ZipFile(folder / "frozen.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(graph, graph.name)
    graph.unlink()
    return folder / "frozen.zip"


def snappy_index(folder: Path) -> Path:
    """The real one of a released model, as TensorFlow packed it."""
    return Path(shutil.copy(GOLDENS / "bundle" / "snappy.index", folder / "ckpt-0.index"))


def keras_h5(folder: Path) -> Path:
    from parity_tests.checkpoint.test_keras_h5 import save_weights

    save_weights(folder / "model.h5", values())
    return folder / "model.h5"


def tflite(kind: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(golden(kind), folder / "model.tflite"))


def weights(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import torch

        from pytorch_model.efficientdet import EfficientDet
        from pytorch_model.weights.files import write_weights

        torch.manual_seed(0)
        path = folder / f"model{suffix}"
        write_weights(path, EfficientDet(CONFIG).state_dict(), CONFIG, {"source": "a sample"})
        return path

    return make


def release(folder: Path) -> Path:
    """Tensors alone: what vouches for them is the hash in the name. Their configuration lies beside them."""
    import torch

    from pytorch_model.efficientdet import EfficientDet
    from pytorch_model.weights import CONFIG_FILE
    from pytorch_model.weights.files import config_text

    torch.manual_seed(0)
    path = folder / "model.pth"
    torch.save(EfficientDet(CONFIG).state_dict(), path)
    (folder / CONFIG_FILE).write_text(config_text(CONFIG, {"source": "a sample"}))
    return path.rename(folder / f"model-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")


HPARAMS = (
    "num_classes=20,image_size=640x480,aspect_ratios=[1.0,2.0,0.5],nms_configs.method=hard,act_type=swish"
)
YAML = """
num_classes: 20
image_size: 640x480
aspect_ratios: [1.0, 2.0, 0.5]
mean_rgb: [123.0, 116.0, 103.0]
nms_configs:
  method: gaussian
  max_output_size: 50
label_map: {1: cat, 2: dog}
"""


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def pipeline(folder: Path) -> Path:
    from parity_tests.checkpoint.test_detection_api import pipeline_text

    return text("pipeline.config", pipeline_text())(folder)


def coco(folder: Path) -> Path:
    from PIL import Image

    images = []
    for number in range(3):
        Image.new("RGB", (16, 12), (number, 0, 0)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 16, "height": 12})
    box = {"bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0, "category_id": 1}
    content = {
        "images": images,
        "annotations": [{"id": n + 1, "image_id": n, **box} for n in range(3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    (folder / "instances_val.json").write_text(json.dumps(content))
    return folder


def kept_results(folder: Path) -> Path:
    """As two processes keep them."""
    coco(folder)
    outcome, shards = evaluate(folder, folder / "shards")
    assert outcome is not None
    assert all(outcome.results.values())
    kept = shards.read()
    shards.clear()
    for batch, content in kept.items():
        shards.append(batch % 2, batch, content)
    return folder


LABELS = "1: person\n2: bicycle\n4: 'traffic light'\n"
LABELS_JSON = {"categories": [{"id": 1, "name": "person"}, {"id": 4, "name": "traffic light"}]}
METRICS = {
    "ours": {"AP": 0.3159, "AP50": 0.4984, "AP75": 0.3464, "APs": -1.0, "APm": 0.3295, "APl": 0.5486},
    "pictures": 158,
    "skipped": {},
    "settings": {"ours": {"weights": "0123456789abcdef" * 4, "image_size": [64, 64]}},
}


def image(name: str, turned: bool = False, **options: Any) -> Callable[[Path], Path]:
    """``turned``: with an EXIF orientation. ``options``: Pillow's for the format."""

    def make(folder: Path) -> Path:
        from PIL import Image

        from porting.synthetic import synthetic_image

        exif = Image.Exif()
        if turned:
            exif[0x0112] = 6
        Image.fromarray(synthetic_image(48, 40)).save(folder / name, exif=exif, **options)
        return folder / name

    return make


def video(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import av

        from porting.synthetic import synthetic_image

        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for number in range(4):
                picture = np.roll(synthetic_image(48, 64), number, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
        return folder / name

    return make


TARGETS = {
    target.name: target
    for target in (
        Target("bundle", bundle, convert_checkpoint, vouched=True),
        Target("sharded bundle", sharded, convert_checkpoint, vouched=True),
        Target("object-based", object_based, convert_checkpoint, vouched=True),
        Target("sealed index", bundle, convert_checkpoint, vouched=False, seal=sealed.index),
        Target("sealed snappy", snappy_index, read_entries, vouched=False, seal=sealed.blocks),
        Target("sealed graph", object_based, convert_checkpoint, vouched=False, seal=sealed.object_graph),
        Target("sealed zip", zipped_graph, convert_checkpoint, vouched=False, seal=sealed.zip_member),
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
