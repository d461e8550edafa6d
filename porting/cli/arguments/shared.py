"""Options that several commands have: which checkpoint, which model, which reference."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.errors import ConfigError
from porting.hparams import Hparams, read_hparams
from porting.parity.reference import KINDS, OPS
from porting.sources import SYNTHETIC
from pytorch_model.config import MODELS
from pytorch_model.detection.settings import DECODERS, MOST_WORKERS, SCOPES
from pytorch_model.engines import AUTO, ENGINES, FLOAT32, GPU_BATCH, NAMES, PRECISIONS

SIZE_HELP = "N, HxW or native: the image size to verify at (default: the model's own, at most 512)"
HPARAMS_HELP = (
    "AutoML's hyper-parameters, in AutoML's syntax: NAME=VALUE,…, a list as 1.0*3.0*0.33 (here also "
    "[1.0,3.0,0.33]), or a .yaml file; they win over a config.yaml that lies with the checkpoint"
)
DEVICE_HELP = "cpu, cuda, cuda:1, … (default: a GPU if there is one)"
WEIGHTS_HELP = "weight file (.safetensors, .pth) or folder"
LABELS_FORMS = (
    "names of the model's classes: a file with one name per line (the first is class 1; COCO's 80 names fit "
    "its 90 classes) or lines 'id: name'; JSON or YAML, a list or {id: name}; COCO annotations; or a "
    "label_map.pbtxt"
)
LABELS_HELP = f"{LABELS_FORMS} (default: those kept with the weights, else COCO's for 90 classes)"
DECODER_HELP = (
    "how JPEG files are decoded; fast-dct equals tf.io.decode_jpeg and needs simplejpeg (default: pillow)"
)
NMS_HELP = (
    "per-class: as AutoML's COCO evaluation; global: across all classes, as AutoML's exported models, also "
    "with nms_configs.max_nms_inputs=0 and boxes clipped to the network's input (default: per-class)"
)
ENGINE_HELP = (
    "what computes the network: "
    + "; ".join(f"{engine.name}, {engine.summary}" for engine in ENGINES.values())
    + " (default: auto, the fastest one that is installed, but never compile, which takes minutes to begin)"
)
BATCH_SIZE_HELP = "images per batch (default: the fastest per image; on a CPU " + (
    ", ".join(f"{engine.cpu_batch} for {engine.name}" for engine in ENGINES.values())
    + f"; on a GPU {GPU_BATCH})"
)
JSON_HELP = "print a machine-readable summary on stdout"


@dataclass(frozen=True)
class SourceOptions:
    """Which checkpoint: ``ckpt`` is a path, a release by name, or ``synthetic:MODEL``."""

    ckpt: str
    step: int | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class ValuesOptions:
    """Which of the checkpoint's values, as :func:`porting.convert.convert` takes them."""

    raw: bool = False
    ema_or_raw: bool = False


@dataclass(frozen=True)
class ModelOptions:
    """Which model, as far as the user says; ``labels``: a file with the names of its classes.

    Raises :class:`ConfigError` if the two say different models.
    """

    model: str | None
    hparams: Hparams
    labels: Path | None = None

    def __post_init__(self) -> None:
        named = self.hparams.model
        if self.model and named not in (None, self.model):
            raise ConfigError(f"--model says {self.model}, the name in --hparams {named}; leave one out")


@dataclass(frozen=True)
class ReferenceOptions:
    """What to compare with: one of ``KINDS``, and its file unless that lies with the checkpoint."""

    kind: str = OPS
    graph: Path | None = None


def add_checkpoint_options(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """``--ckpt``, ``--step``, ``--cache-dir``."""
    parser.add_argument(
        "--ckpt",
        required=required,
        help="checkpoint folder, prefix, file or archive; one of Google's releases by name, such as "
        f"efficientdet-d0, or address; "
        f"or {SYNTHETIC}MODEL",
    )
    parser.add_argument("--step", type=int, help="which of several steps in the folder (default: the newest)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where releases are kept (default: ~/.cache/efficientdet-porting)",
    )


def read_checkpoint_options(arguments: argparse.Namespace) -> SourceOptions:
    return SourceOptions(arguments.ckpt, arguments.step, arguments.cache_dir)


def add_values_options(parser: argparse._ActionsContainer) -> None:
    """``--raw``, ``--ema-or-raw``."""
    values = parser.add_mutually_exclusive_group()
    values.add_argument("--raw", action="store_true", help="the raw values, not the moving averages")
    values.add_argument(
        "--ema-or-raw",
        action="store_true",
        help="the moving average of a variable if it has one, else its raw value, as AutoML's Keras code "
        "restores them (default: all averages, or none)",
    )


def read_values_options(arguments: argparse.Namespace) -> ValuesOptions:
    return ValuesOptions(arguments.raw, arguments.ema_or_raw)


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """``--model``, ``--hparams``."""
    parser.add_argument(
        "--model",
        type=lambda name: name.lower().replace("_", "-"),
        choices=MODELS,
        metavar="MODEL",
        help="model variant (default: inferred from the checkpoint)",
    )
    add_hparams_option(parser)


def read_model_options(arguments: argparse.Namespace) -> ModelOptions:
    return ModelOptions(arguments.model, arguments.hparams, getattr(arguments, "labels", None))


def add_labels_to_keep(parser: argparse._ActionsContainer) -> None:
    """``--labels`` of a command that writes weights."""
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help=f"{LABELS_FORMS}; they are kept with the weights (default: the label_map of --hparams)",
    )


def add_size_option(parser: argparse._ActionsContainer) -> None:
    """``--size``, which :func:`porting.parity.inputs.verification_size` reads."""
    parser.add_argument("--size", default="", help=SIZE_HELP)


def add_hparams_option(parser: argparse._ActionsContainer) -> None:
    """``--hparams``; a bad one is rejected before anything is downloaded."""
    parser.add_argument(
        "--hparams", type=read_hparams, default=read_hparams(""), metavar="TEXT", help=HPARAMS_HELP
    )


def add_reference_options(parser: argparse._ActionsContainer, default: str | None = OPS) -> None:
    """``--reference``, ``--graph``."""
    parser.add_argument(
        "--reference",
        choices=KINDS,
        default=default,
        help=f"what to compare with (default: {default or 'nothing'}): AutoML's network rebuilt in plain "
        "operations (ops); the graph saved with the checkpoint (meta); an exported model (savedmodel); a "
        "Lite file (tflite)",
    )
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="PATH",
        help="the file of that reference: .meta, SavedModel folder, frozen .pb or .tflite (default: the "
        "checkpoint's own)",
    )


def read_reference_options(arguments: argparse.Namespace) -> ReferenceOptions:
    return ReferenceOptions(arguments.reference, arguments.graph)


def add_detection_options(parser: argparse._ActionsContainer) -> None:
    """The options of :class:`DetectionOptions`, ``--labels``, ``--decoder``, ``--nms`` and others."""
    parser.add_argument("--labels", type=Path, metavar="FILE", help=LABELS_HELP)
    parser.add_argument("--decoder", choices=DECODERS, default="pillow", help=DECODER_HELP)
    parser.add_argument("--nms", choices=tuple(SCOPES), default="per-class", help=NMS_HELP)
    add_hparams_option(parser)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--engine", choices=NAMES, default=AUTO, help=ENGINE_HELP)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=FLOAT32,
        help="what the network computes with (default: float32); lower ones suit a GPU and change results",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of the processor, for the network (default: PyTorch's choice)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read and resize images ahead of the network (default: half of the cores, at most "
        "16); 0: read, compute and write in turn; the results are the same",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help=BATCH_SIZE_HELP)


def check_detection_options(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str
) -> None:
    """Reject impossible numbers of :func:`add_detection_options`, and of ``names`` those less than 1."""
    check_at_least_one(parser, arguments, "batch_size", "threads", *names)
    if arguments.workers is not None and not 0 <= arguments.workers <= MOST_WORKERS:
        parser.error(f"--workers is {arguments.workers}, must be from 0 to {MOST_WORKERS}")
    engine = ENGINES.get(arguments.engine)
    if engine and engine.only_float32 and arguments.precision != FLOAT32:
        parser.error(
            f"--engine {engine.name} computes in float32 only; for {arguments.precision} take --engine folded"
        )


def check_at_least_one(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str) -> None:
    """Reject an option of ``names`` that was given and is less than 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least 1")
