"""``detect``: detect in images or a video, print what was found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.cli.arguments.detect import DetectOptions
from porting.cli.drawing.progress import ImageBar
from porting.cli.process import EXIT_FAILED, print_json
from porting.hparams import given_names, nms_and_size
from pytorch_model import load_model
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.labels import ClassNames, find_names
from pytorch_model.detection.run import DetectionResult, detect_into, list_images, prepare_folder
from pytorch_model.devices import choose_device, dtype_of, use_threads
from pytorch_model.engines import computed_by


def run(options: DetectOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    files = list_images(options.images)
    use_threads(options.threads)
    model = load_model(options.weights).to(choose_device(options.device), dtype_of(options.precision))
    count, own = model.config.num_classes, model.config.class_names
    classes = find_names(options.labels, count, own, given_names(options.hparams, count))
    nms, image_size = nms_and_size(options.hparams, model.config, options.nms)
    prepare_folder(options.out, files)
    detector = Detector(
        model,
        image_size=image_size,
        nms=nms,
        score_threshold=options.score_threshold,
        decoder=options.decoder,
        engine=options.engine,
    )
    with ImageBar(console) as bar:
        result = detect_into(
            options.out,
            detector,
            files,
            classes,
            weights=str(options.weights),
            batch_size=options.batch_size,
            workers=options.workers,
            listener=bar,
        )
    _draw(console, result, classes, bar.seconds, options.out)
    if options.json:
        print_json(result.summary)
    return EXIT_FAILED if result.summary["unreadable"] else 0


def _draw(console: Console, result: DetectionResult, names: ClassNames, seconds: float, out: Path) -> None:
    summary = result.summary
    images, unreadable = summary["images"], summary["unreadable"]
    classes = Counter(names.shown[row["category_id"]] for row in result.rows)
    decoders = Counter(image["decoder"] for image in images)
    table = Table(
        title=f"{summary['model']} on {summary['device']}, {computed_by(summary)}", show_header=False
    )
    unit = "frames" if images and "frame" in images[0] else "images"
    table.add_row(unit, str(len(images)))
    turned = sum(image.get("exif_orientation", 1) != 1 for image in images)
    if turned:
        table.add_row("turned upright, by EXIF", str(turned))
    table.add_row("read by", ", ".join(f"{name} ({count})" for name, count in decoders.items()))
    table.add_row(f"detections above {summary['score_threshold']:g}", str(sum(classes.values())))
    for name, count in classes.most_common(8):
        table.add_row(f"  {escape(name)}", str(count))
    if len(classes) > 8:
        table.add_row("  others", str(sum(classes.values()) - sum(n for _, n in classes.most_common(8))))
    table.add_row("class names", escape(names.source))
    table.add_row("time", f"{seconds:.1f} s, {summary['speed']['images_per_second']:.1f} {unit}/s")
    table.add_row("wrote", str(out))
    console.print(table)
    for path, reason in unreadable.items():
        console.print(f"skipped {path}: {reason}", style="yellow", markup=False, soft_wrap=True)
    for note in summary["notes"]:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if unreadable:
        console.print(f"{len(unreadable)} images skipped", style="yellow")
