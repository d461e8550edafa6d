"""Measure speed, side by side in one run.

infer: the networks of ours and of other programs; eval: the parts of an evaluation; detect: the parts of
detection; convert: conversion against `import torch`; read: our reader against others; cold: a first answer,
from the start of Python, against `import torch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.bench.sides import ALL, DEFAULT, SIDES
from porting.cli.arguments.shared import ENGINE_HELP, WEIGHTS_HELP, check_at_least_one
from porting.cli.process import EXIT_CODES
from pytorch_model.config import MODELS
from pytorch_model.engines import AUTO, NAMES

_SIDES = "\n".join(
    f"  {side.name:<20}{side.summary}{' (slow to begin: only by name)' if side.slow else ''}"
    for side in SIDES.values()
)
EPILOG = f"""
examples:
  python tools/bench.py infer --models efficientdet-d0,efficientdet-lite0 --batch-sizes 1,8
  python tools/bench.py infer --weights mine.safetensors --threads 1 --sides eager,onnxruntime
  python tools/bench.py infer --models efficientdet-d0 --sides all --device cuda --json
  python tools/bench.py eval --weights d0.safetensors --data coco/ --limit 100
  python tools/bench.py detect --batch-size 8         # decode, resize, network, select, NMS
  python tools/bench.py convert                       # converting D0 against `import torch`
  python tools/bench.py read --model efficientdet-d7x # our reader, a plain read, TensorFlow's reader
  python tools/bench.py cold                          # --help, and detecting in one image

sides of infer:
{_SIDES}

A side that is not installed, or that fails, gets a row that says so. docs/performance.md tells how to read
the figures.

{EXIT_CODES}
"""

CONVERT, READ, DETECT, COLD, INFER, EVAL = "convert", "read", "detect", "cold", "infer", "eval"
KINDS = (INFER, EVAL, DETECT, CONVERT, READ, COLD)

#: Options that only some kinds have, by their names in the namespace, with their defaults.
_ONLY: dict[str, tuple[tuple[str, ...], Any]] = {
    "models": ((INFER,), ("efficientdet-d0",)),
    "batch_sizes": ((INFER,), (1, 8)),
    "image_size": ((INFER,), None),
    "sides": ((INFER,), DEFAULT),
    "weights": ((INFER, EVAL), None),
    "threads": ((INFER, EVAL), None),
    "data": ((EVAL,), None),
    "limit": ((EVAL,), None),
    "engine": ((EVAL,), AUTO),
}


@dataclass(frozen=True)
class BenchOptions:
    """``what``: ``CONVERT``, ``READ`` or ``DETECT``; only the last uses ``batch_size`` and ``device``."""

    what: str
    model: str
    repeat: int
    batch_size: int
    device: str
    json: bool


@dataclass(frozen=True)
class InferOptions:
    """``image_size``: of a square; None is the model's own. ``weights``: a file, instead of ``models``."""

    models: tuple[str, ...]
    weights: Path | None
    batch_sizes: tuple[int, ...]
    image_size: int | None
    sides: tuple[str, ...]
    device: str
    threads: int | None
    repeat: int
    json: bool


@dataclass(frozen=True)
class EvalBenchOptions:
    weights: Path
    data: Path
    limit: int | None
    batch_size: int
    device: str
    engine: str
    threads: int | None
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("--model", help="for convert, read, detect, cold (default: efficientdet-d0)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each side, in turn (default: 5)")
    parser.add_argument("--batch-size", type=int, default=8, help="for detect and eval (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    both = parser.add_argument_group("infer and eval")
    both.add_argument("--weights", type=Path, help=f"{WEIGHTS_HELP}; infer: instead of --models")
    both.add_argument("--threads", type=int, metavar="N", help="of each side (default: PyTorch's choice)")
    infer = parser.add_argument_group("infer")
    infer.add_argument(
        "--models",
        type=_names(MODELS),
        metavar="MODEL,…",
        help="with seeded weights (default: efficientdet-d0)",
    )
    infer.add_argument("--batch-sizes", type=_numbers, metavar="N,…", help="images per batch (default: 1,8)")
    infer.add_argument("--image-size", type=int, metavar="N", help="N × N pixels (default: the model's own)")
    infer.add_argument(
        "--sides",
        type=_names((ALL, *SIDES)),
        metavar="SIDE,…",
        help=f"what to measure, see below, or {ALL} (default: all that are not slow to begin)",
    )
    evaluation = parser.add_argument_group("eval")
    evaluation.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="COCO annotations and images, or images only, which are not scored",
    )
    evaluation.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    evaluation.add_argument("--engine", choices=NAMES, help=ENGINE_HELP)


def read_options(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> BenchOptions | InferOptions | EvalBenchOptions:
    what = arguments.what
    check_at_least_one(parser, arguments, "repeat", "batch_size", "threads", "limit", "image_size")
    if arguments.model and what in (INFER, EVAL):
        parser.error(f"--model is not for {what}: give {'--models' if what == INFER else '--weights'}")
    given = {name for name in _ONLY if getattr(arguments, name) is not None}
    for name in _ONLY:
        kinds, default = _ONLY[name]
        if name in given and what not in kinds:
            parser.error(f"--{name.replace('_', '-')} is for {' and '.join(kinds)}, not for {what}")
        if name not in given:
            setattr(arguments, name, default)
    if what == INFER:
        if {"weights", "models"} <= given:
            parser.error("--weights says which model: leave --models out")
        return InferOptions(
            models=arguments.models,
            weights=arguments.weights,
            batch_sizes=arguments.batch_sizes,
            image_size=arguments.image_size,
            sides=tuple(SIDES) if ALL in arguments.sides else arguments.sides,
            device=arguments.device,
            threads=arguments.threads,
            repeat=arguments.repeat,
            json=arguments.json,
        )
    if what == EVAL:
        if not {"weights", "data"} <= given:
            parser.error("eval needs --weights and --data")
        return EvalBenchOptions(
            weights=arguments.weights,
            data=arguments.data,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
            engine=arguments.engine,
            threads=arguments.threads,
            json=arguments.json,
        )
    return BenchOptions(
        what,
        arguments.model or "efficientdet-d0",
        arguments.repeat,
        arguments.batch_size,
        arguments.device,
        arguments.json,
    )


def _listed(text: str) -> tuple[str, ...]:
    """The words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def _names(known: Any) -> Callable[[str], tuple[str, ...]]:
    """A list of names that are all in ``known``; AutoML's spelling with underscores is accepted."""

    def read(text: str) -> tuple[str, ...]:
        words = tuple(word.lower().replace("_", "-") for word in _listed(text))
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return words

    return read


def _numbers(text: str) -> tuple[int, ...]:
    words = _listed(text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1, such as 1,8")
    return tuple(dict.fromkeys(int(word) for word in words))
