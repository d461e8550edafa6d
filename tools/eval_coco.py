#!/usr/bin/env python3
"""COCO's figures of a weight file, beside the same figures of a TensorFlow reference on the same input."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _source
from _evaluation import figures_table, parity_table, per_class_table, print_notes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from porting.convert import convert
from porting.errors import ConfigError, OutputError
from porting.hparams import nms_and_size, read_hparams
from pytorch_model import load_model
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.settings import DECODERS, TTA
from pytorch_model.evaluation.coco import (
    Dataset,
    Evaluation,
    class_to_category,
    evaluate,
    read_dataset,
    server_file_name,
    server_results,
)
from pytorch_model.evaluation.detection_parity import DetectionParity, compare_detections
from pytorch_model.evaluation.processes import Processes, has_others, joined
from pytorch_model.evaluation.run import Outcome, Stream, detect_dataset, kept_batches, settings
from pytorch_model.evaluation.shards import Shards
from pytorch_model.files import locked, make_folder, replacing, sha256_of_file
from pytorch_model.weights.files import weight_file

EXAMPLES = f"""
examples:
  python tools/eval_coco.py --weights d0.safetensors --coco coco/ --decoder fast-dct
  # beside AutoML's network in TensorFlow ops, on the first 200 pictures
  python tools/eval_coco.py --weights d0.safetensors --coco coco/ --reference ops --ckpt d0_ckpt/ --limit 200
  # on 8 GPUs; the figures are the same
  torchrun --nproc-per-node=8 tools/eval_coco.py --weights d7.safetensors --coco coco/
  # a data set of one's own, whose category ids are not the model's class ids
  python tools/eval_coco.py --weights mine.pth --annotations test.json --images pictures/ --labels names.txt
  # mirror images too: AutoML's fusion goes with hard suppression
  python tools/eval_coco.py --weights d0.pth --coco coco/ --tta flip --hparams nms_configs.method=hard
  # for COCO's server
  python tools/eval_coco.py --weights d7.pth --annotations image_info_test-dev2017.json --images test2017/ \\
      --test-dev efficientdet-d7

The folder --out receives detections.json and, with --reference, reference_detections.json (COCO results),
metrics.json, and shards/, which a run that was interrupted goes on from: start it again as it was.
A reference sees the same decoded and resized pictures, and its outputs go through the same suppression.
Exit status 1 also where pictures could not be read, and where detections differ from the reference's (but
those of a quantised TFLite file, which differ by nature).

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="weight file or folder")
    data = parser.add_argument_group("data set")
    data.add_argument(
        "--coco", type=Path, metavar="DIR", help="holds annotations/instances_*.json and pictures"
    )
    data.add_argument("--annotations", type=Path, metavar="FILE", help="the annotations, in COCO's format")
    data.add_argument("--images", type=Path, metavar="DIR", help="the pictures")
    data.add_argument(
        "--labels", type=Path, metavar="FILE", help="names of the model's classes, see detect.py"
    )
    data.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    reference = parser.add_argument_group("reference")
    _source.add_reference_options(reference, default=None)
    _source.add_checkpoint_options(reference, required=False)
    reference.add_argument("--raw", action="store_true", help="the raw values, not the moving averages")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--decoder", choices=DECODERS, default="pillow", help="as for detect.py (default: pillow)"
    )
    how.add_argument(
        "--hparams", type=read_hparams, default=read_hparams(""), metavar="TEXT", help=_source.HPARAMS_HELP
    )
    how.add_argument("--tta", choices=TTA, default="none", help="flip: fuse with what the mirror image shows")
    how.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    how.add_argument("--batch-size", type=int, default=8, help="pictures at a time (default: 8)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="DIR", help="results (default: eval_ and the weights' name)"
    )
    output.add_argument("--restart", action="store_true", help="forget what an earlier run left in --out")
    output.add_argument("--per-class", action="store_true", help="also the AP of each class")
    output.add_argument("--test-dev", metavar="ALG", help="write detections_test-dev2017_ALG_results.json")
    output.add_argument("--json", action="store_true", help="print metrics.json on stdout")
    arguments = parser.parse_args()
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    if not arguments.coco and not arguments.annotations:
        parser.error("give --coco or --annotations")
    if bool(arguments.reference) != bool(arguments.ckpt):
        parser.error("--reference and --ckpt go together")
    if arguments.test_dev is not None:
        server_file_name(arguments.test_dev)
    arguments.out = arguments.out or Path(f"eval_{arguments.weights.stem}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if has_others():
        _cli.end_at_once_when_told()
    with ExitStack() as held:  # the folder --out, until all is written
        with joined() as processes:
            console = Console(stderr=arguments.json, highlight=False, quiet=not processes.is_first)
            if not processes.is_first:
                processes.from_first(None)  # whatever is wrong, the first process finds and says it
            dataset = read_dataset(arguments.coco, arguments.annotations, arguments.images, arguments.limit)
            detector = build_detector(arguments, processes)
            categories = class_to_category(dataset, detector.model.config.num_classes, arguments.labels)
            streams = build_streams(arguments, console, detector, dataset, categories)
            if processes.is_first:
                held.enter_context(alone_in(arguments.out))
                prepare_output(arguments, dataset, streams)
                processes.from_first(None)
            started = time.perf_counter()
            outcome = run(arguments, console, detector, dataset, streams, categories, processes)
            seconds = time.perf_counter() - started
        if outcome is None:
            return 0
        return report(arguments, console, detector, dataset, streams, outcome, seconds)


def build_detector(arguments: argparse.Namespace, processes: Processes) -> Detector:
    device = _cli.choose_device(arguments.device, processes.local_rank)
    model = load_model(arguments.weights).to(device)
    nms, image_size = nms_and_size(arguments.hparams, model.config)
    return Detector(model, image_size=image_size, nms=nms, decoder=arguments.decoder, tta=arguments.tta)


def build_streams(
    arguments: argparse.Namespace,
    console: Console,
    detector: Detector,
    dataset: Dataset,
    categories: dict[int, int],
) -> list[Stream]:
    shards, size = arguments.out / "shards", arguments.batch_size
    of_ours = settings(detector, dataset, size, categories, sha256_of_file(weight_file(arguments.weights)))
    streams = [Stream("ours", None, Shards(shards, "ours", of_ours))]
    if arguments.reference:
        streams.append(reference_stream(arguments, console, detector, of_ours))
    return streams


def reference_stream(
    arguments: argparse.Namespace, console: Console, detector: Detector, of_ours: Mapping[str, Any]
) -> Stream:
    """Raises :class:`EfficientDetError` where the reference cannot be run or is of another network."""
    from _verify import chosen_reference, require_tensorflow

    from porting.parity.reference.networks import file_network, ops_network

    require_tensorflow()
    config = detector.model.config
    with _source.open_checkpoint(arguments, console, arguments.out) as checkpoint:
        conversion = convert(checkpoint, config, raw=arguments.raw)
        reference = chosen_reference(arguments, checkpoint, conversion)
    digests, exact = [conversion.digest], True
    if reference is None:
        network = ops_network(conversion.variables, config)
    else:
        network, exact = file_network(reference, config), reference.exact
        digests += [sha256_of_file(file) for file in files_of(Path(reference.source))]
        if reference.size not in (None, detector.image_size):
            height, width = reference.size
            raise ConfigError(
                f"{reference.source} takes pictures of {height}×{width}; give --hparams "
                f"image_size={width}x{height} to see both at that size"
            )
    settings_ = {**of_ours, "reference": arguments.reference, "weights": digests}
    return Stream("reference", network, Shards(arguments.out / "shards", "reference", settings_), exact)


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Create ``out`` and keep other evaluations out of it.

    Raises :class:`OutputError` where it cannot be created or another evaluation is at work in it.
    """

    def refuse() -> None:
        raise OutputError(f"another evaluation is at work in {out}; let it end, or choose another --out")

    make_folder(out)
    make_folder(out / "shards")
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / ".lock", refuse))
        except OSError as error:
            raise OutputError(
                f"cannot write in {out}: {error.strerror or error}; choose another folder"
            ) from None
        yield


def prepare_output(arguments: argparse.Namespace, dataset: Dataset, streams: Sequence[Stream]) -> None:
    """Raises :class:`EfficientDetError` where earlier results belong to other settings, or are damaged."""
    if arguments.restart:
        forget(arguments.out)
    for stream in streams:
        kept_batches(stream, dataset, arguments.batch_size)


def forget(out: Path) -> None:
    """Remove all that an earlier run wrote, so that nothing of it lies beside what this one writes.

    Raises :class:`OutputError` where the disk refuses.
    """
    for name in ("ours", "reference"):
        Shards(out / "shards", name, {}).clear()
    files = [out / name for name in ("metrics.json", "detections.json", "reference_detections.json")]
    try:
        for file in (*files, *out.glob("detections_test-dev2017_*_results.json")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}; choose another --out") from None


def run(
    arguments: argparse.Namespace,
    console: Console,
    detector: Detector,
    dataset: Dataset,
    streams: Sequence[Stream],
    categories: dict[int, int],
    processes: Processes,
) -> Outcome | None:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("detecting", total=len(dataset.pictures))

        def advance(done: int, total: int) -> None:
            described = f"detecting (process 1 of {processes.count})" if processes.count > 1 else "detecting"
            progress.update(task, completed=done, total=total, description=described)

        return detect_dataset(
            detector, dataset, streams, categories, arguments.batch_size, processes, advance
        )


def report(
    arguments: argparse.Namespace,
    console: Console,
    detector: Detector,
    dataset: Dataset,
    streams: Sequence[Stream],
    outcome: Outcome,
    seconds: float,
) -> int:
    """Write the files, print the tables; the exit status."""
    ours, reference = outcome.results["ours"], outcome.results.get("reference")
    save_json(arguments.out / "detections.json", ours)
    if reference is not None:
        save_json(arguments.out / "reference_detections.json", reference)
    if arguments.test_dev:
        save_json(arguments.out / server_file_name(arguments.test_dev), server_results(ours))
    evaluations = {
        stream.name: evaluate(dataset.content, outcome.results[stream.name], outcome.evaluated)
        for stream in streams
        if dataset.has_ground_truth
    }
    parity = compare_detections(ours, reference) if reference is not None else None
    metrics = summarise(arguments, streams, outcome, evaluations, parity)
    save_json(arguments.out / "metrics.json", metrics)
    draw(arguments, console, detector, dataset, outcome, evaluations)
    if parity:
        draw_parity(console, parity, streams[1].exact)
    print_notes(console, dataset.notes, outcome.unreadable, len(outcome.resized))
    console.print(
        f"{len(outcome.evaluated)} pictures, {seconds:.1f} s; wrote {arguments.out}",
        markup=False,
        soft_wrap=True,
    )
    if arguments.json:
        json.dump(metrics, sys.stdout, indent=2)
        print()
    failed = parity is not None and streams[1].exact and not parity.passed
    return _cli.EXIT_FAILED if failed or outcome.unreadable else 0


def summarise(
    arguments: argparse.Namespace,
    streams: Sequence[Stream],
    outcome: Outcome,
    evaluations: dict[str, Evaluation],
    parity: DetectionParity | None,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: evaluation.figures for name, evaluation in evaluations.items()}
    if len(evaluations) == 2:
        metrics["difference"] = {
            name: value - metrics["reference"][name] for name, value in metrics["ours"].items()
        }
    if arguments.per_class:
        metrics["per_class"] = {name: evaluation.per_class for name, evaluation in evaluations.items()}
    return {
        **metrics,
        "detection_parity": parity.figures() if parity else None,
        "pictures": len(outcome.evaluated),
        "skipped": {str(picture): reason for picture, reason in outcome.unreadable.items()},
        "size_differs": outcome.resized,
        "decoders": dict(outcome.decoders),
        "settings": {stream.name: stream.shards.settings for stream in streams},
    }


def draw(
    arguments: argparse.Namespace,
    console: Console,
    detector: Detector,
    dataset: Dataset,
    outcome: Outcome,
    evaluations: dict[str, Evaluation],
) -> None:
    decoders = ", ".join(f"{name} ({count})" for name, count in outcome.decoders.items())
    height, width = detector.image_size
    count = len(outcome.evaluated)
    title = f"{detector.model.config.name} at {height}×{width}, {count} pictures, read by {decoders}"
    if detector.tta != "none":
        title += f", tta {detector.tta}"
    console.print(title, markup=False, soft_wrap=True)
    if detector.tta != "none" and detector.nms.is_soft:
        console.print(
            "flip also fuses what soft suppression keeps of one object; it goes with nms_configs.method=hard",
            style="yellow",
            soft_wrap=True,
        )
    if evaluations:
        ours, reference = evaluations["ours"], evaluations.get("reference")
        console.print(figures_table(ours, reference, arguments.reference))
        if arguments.per_class:
            console.print(per_class_table(ours, reference, dataset.categories))
    else:
        console.print(f"{dataset.annotations.name} holds no annotations: no figures", markup=False)


def draw_parity(console: Console, parity: DetectionParity, exact: bool) -> None:
    console.print(parity_table(parity))
    if not exact:
        console.print("no verdict: the reference is quantised, and its rounding is part of what it is")
        return
    if not parity.reference:
        console.print("[red bold]FAILED[/] detection parity: the reference found nothing to compare with")
        return
    verdict = "[green bold]passed[/]" if parity.passed else "[red bold]FAILED[/]"
    console.print(f"{verdict} detection parity: AP {parity.ap:.4f}, must be 1.000", soft_wrap=True)
    if parity.saturated and not parity.passed:
        console.print(
            f"{parity.saturated} of the reference's scores round to 1, so their order is chance: these "
            "weights were not made for such pictures, and detections cannot prove them; verify.py can",
            style="yellow",
            soft_wrap=True,
        )


def save_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _cli.run(main)
