"""A small sound sample of each kind of file that a user may bring: ``make(folder)`` returns its path."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity_tests.helpers.object_trees import VALUE, automl_graph, automl_paths, pipeline_text, save_h5
from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.tflite_files import TINY, golden, tiny_variables

if TYPE_CHECKING:
    from pytorch_model.detection.detector import Detector
    from pytorch_model.evaluation.shards import Shards
    from pytorch_model.evaluation.streams import Outcome

CONFIG = TINY.replace(fpn_cell_repeats=1, box_class_repeats=1)


@cache
def values() -> Mapping[str, np.ndarray]:
    return tiny_variables(CONFIG)


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
    """A checkpoint with an object graph. The project never writes strings: the entry is made by hand."""
    from porting.checkpoint.objects.graph import GRAPH_KEY
    from porting.checkpoint.v2.table import write_table
    from porting.checkpoint.v2.writer import _entry, _header
    from pytorch_model.formats import wire
    from pytorch_model.formats.crc32c import masked_crc32c

    paths = automl_paths(CONFIG)
    length = len(graph).to_bytes(4, "little")
    length_crc = masked_crc32c(length).to_bytes(4, "little")
    raw = wire.write_varint(len(graph)) + length_crc + graph
    crc = masked_crc32c(length + length_crc + graph)
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
    from pytorch_model.formats import wire

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
    """The index of a released model, as TensorFlow compressed it."""
    return Path(shutil.copy(GOLDENS / "bundle" / "snappy.index", folder / "ckpt-0.index"))


def keras_h5(folder: Path) -> Path:
    save_h5(folder / "model.h5", values())
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
    """Only tensors: their checksum is the hash in the name. Their configuration is in the same folder."""
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
    """The kept results of two processes."""
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
LABELS_YAML = "nc: 5\nnames:\n  0: person\n  1: 'bicycle'\n  4: no\n"
LABEL_MAP = (
    'item {\n  id: 4\n  name: "/m/01"\n  display_name: "traffic light"\n}\nitem { name: \'dog\' id: 2 }\n'
)
METRICS = {
    "ours": {"AP": 0.3159, "AP50": 0.4984, "AP75": 0.3464, "APs": -1.0, "APm": 0.3295, "APl": 0.5486},
    "pictures": 158,
    "skipped": {},
    "settings": {"ours": {"weights": "0123456789abcdef" * 4, "image_size": [64, 64]}},
}


def image(name: str, turned: bool = False, **options: Any) -> Callable[[Path], Path]:
    """``turned``: with an EXIF orientation. ``options``: Pillow's options for the format."""

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


def evaluate(pictures: Path, folder: Path) -> tuple[Outcome | None, Shards]:
    """Evaluate as tools/eval_coco.py does, with one image per batch."""
    from pytorch_model.detection.pipeline import Pipeline
    from pytorch_model.evaluation.dataset import read_dataset
    from pytorch_model.evaluation.processes import Processes
    from pytorch_model.evaluation.shards import Shards
    from pytorch_model.evaluation.streams import Stream, detect_dataset, settings

    dataset, detector, categories = read_dataset(pictures), small_detector(), {1: 1, 2: 18}
    shards = Shards(folder, "ours", settings(detector, dataset, 1, categories, "of a sample"))
    streams = [Stream("ours", None, shards)]
    pipeline = Pipeline(detector, batch_size=1)
    outcome = detect_dataset(pipeline, dataset, streams, categories, Processes(), lambda *_: None)
    return outcome, shards


@cache
def small_detector() -> Detector:
    import torch

    from pytorch_model.detection.detector import Detector
    from pytorch_model.detection.settings import NMSConfig
    from pytorch_model.efficientdet import EfficientDet

    torch.manual_seed(0)
    return Detector(EfficientDet(CONFIG), image_size=(64, 64), nms=NMSConfig(max_output_size=5))
