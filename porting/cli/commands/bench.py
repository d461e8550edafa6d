"""``bench``: time two or more sides in turn and print the ratios of their medians."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import porting
from porting.cli.arguments.bench import CONVERT, DETECT, EVAL, READ, BenchOptions
from porting.cli.process import print_json

PACKAGES = Path(porting.__file__).parents[1]  # the folder to import this project from


def run(options: BenchOptions) -> int:
    bench = {CONVERT: _convert, READ: _read, DETECT: _detect, EVAL: _eval}[options.what]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures = bench(Path(folder), options)
    if options.json:
        print_json(figures)
    else:
        _draw(Console(highlight=False), figures)
    return 0


def _synthetic(folder: Path, model: str, momentum: bool) -> Path:
    from porting.checkpoint.v2.writer import write_bundle
    from porting.synthetic import synthetic_checkpoint
    from pytorch_model.config import model_config

    prefix = folder / model / "model"
    write_bundle(prefix, synthetic_checkpoint(model_config(model), momentum=momentum))
    return prefix


def _side_by_side(sides: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each side. The sides run in turn, so that a busy moment affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _python(*arguments: str) -> Callable[[], Any]:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def _convert(folder: Path, options: BenchOptions) -> dict[str, Any]:
    """Whole processes, in which TensorFlow cannot be imported, as on a machine without it."""
    prefix = _synthetic(folder, options.model, momentum=False)
    convert = (
        "import sys; sys.modules['tensorflow'] = None; "
        f"sys.argv = ['convert.py', '--ckpt', {str(prefix)!r}, '--out', {str(folder / 'w.safetensors')!r}]; "
        f"sys.path.insert(0, {str(PACKAGES)!r}); "
        "from porting.cli.main import run_command; run_command('convert')"
    )
    sides = {
        "import torch": _python("-c", "import torch"),
        f"convert {options.model}, no TensorFlow": _python("-c", convert),
    }
    return _summarise(_side_by_side(sides, options.repeat), "import torch")


def _read(folder: Path, options: BenchOptions) -> dict[str, Any]:
    """The variables a port needs (the moving averages) out of a training checkpoint, file cache warm."""
    from porting.checkpoint import open_checkpoint
    from porting.checkpoint.v2.index import read_index
    from porting.scopes import EMA_SUFFIX

    prefix = _synthetic(folder, options.model, momentum=True)
    entries = read_index(f"{prefix}.index").entries
    wanted = {name: entry for name, entry in entries.items() if name.endswith(EMA_SUFFIX)}

    def plain() -> None:
        with open(f"{prefix}.data-00000-of-00001", "rb", buffering=0) as file:
            for entry in sorted(wanted.values(), key=lambda entry: entry.offset):
                file.seek(entry.offset)
                buffer = bytearray(entry.size)
                assert file.readinto(buffer) == entry.size

    def ours() -> int:
        with open_checkpoint(prefix) as checkpoint:
            return len(dict(checkpoint.read_many(wanted)))

    sides: dict[str, Callable[[], Any]] = {
        "plain read of the same bytes": plain,
        "ours, checksums verified": ours,
    }
    import_seconds = None
    try:
        start = time.perf_counter()
        import tensorflow as tf

        import_seconds = time.perf_counter() - start
    except ImportError:
        pass
    else:

        def theirs() -> int:
            reader = tf.train.load_checkpoint(str(prefix))
            return len([reader.get_tensor(name) for name in wanted])

        sides["tf.train.load_checkpoint"] = theirs
    figures = _summarise(_side_by_side(sides, options.repeat), "plain read of the same bytes")
    size = sum(entry.size for entry in wanted.values())
    peak = _peak_memory(prefix)
    figures |= {
        "megabytes_kept": size / 1e6,
        "peak_megabytes": peak / 1e6,
        "peak_over_kept": peak / size,
        "tensorflow_import_seconds": import_seconds,
    }
    return figures


def _peak_memory(prefix: Path) -> float:
    """Bytes that reading the moving averages allocates at its peak in a new process, NumPy's included."""
    code = (
        f"import sys, tracemalloc; sys.path.insert(0, {str(PACKAGES)!r})\n"
        "from porting.checkpoint import open_checkpoint\n"
        "import porting.checkpoint.v2.bundle, porting.checkpoint.v2.locate\n"
        "tracemalloc.start()\n"
        f"with open_checkpoint({str(prefix)!r}) as c:\n"
        "    kept = dict(c.read_many(n for n in c if n.endswith('/ExponentialMovingAverage')))\n"
        "print(tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _detect(folder: Path, options: BenchOptions) -> dict[str, Any]:
    """The parts of detection on one batch of JPEG files, 640 x 480. No time depends on the weights."""
    import torch

    from pytorch_model import create_model
    from pytorch_model.detection.detector import Detector
    from pytorch_model.detection.postprocess import per_class_nms
    from pytorch_model.detection.preprocess import load_image
    from pytorch_model.detection.suppression.candidates import Candidates, pre_nms
    from pytorch_model.devices import choose_device

    device = choose_device(options.device)
    files = _photographs(folder, options.batch_size)
    torch.manual_seed(0)
    detector = Detector(create_model(options.model).to(device))
    pixels = [load_image(file).pixels for file in files]
    batch = detector.preprocess(pixels)
    anchors_yxyx, nms = detector.anchors_yxyx.to(device), detector.nms
    with torch.no_grad():
        class_outputs, box_outputs = detector.model(batch.images)

    def select() -> Candidates:
        return pre_nms(class_outputs, box_outputs, anchors_yxyx, nms.max_nms_inputs)

    candidates = select()

    def timed(part: Callable[[], Any]) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            part()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        run()  # the first run is always slower
        return run

    sides = {
        "decode, pillow": timed(lambda: [load_image(file) for file in files]),
        "normalise, resize, pad": timed(lambda: detector.preprocess(pixels)),
        "network": timed(lambda: detector.model(batch.images)),
        "select": timed(select),
        "NMS": timed(lambda: per_class_nms(candidates, nms, batch.image_scales)),
    }
    if importlib.util.find_spec("simplejpeg"):
        sides["decode, fast-dct"] = timed(lambda: [load_image(file, "fast-dct") for file in files])
    figures = _summarise(_side_by_side(sides, options.repeat), "network")
    return figures | {
        "postprocessing_over_network": figures["ratio"]["select"] + figures["ratio"]["NMS"],
        "described": f"{options.model}, batch of {options.batch_size}, {device}, "
        f"{torch.get_num_threads()} threads",
    }


EVAL_IMAGES = 100


def _eval(folder: Path, options: BenchOptions) -> dict[str, Any]:
    """The pipeline with several numbers of workers, against the network of the same engine alone."""
    import torch

    from pytorch_model import create_model
    from pytorch_model.detection.detector import Detector
    from pytorch_model.detection.pipeline import Pipeline, Speed
    from pytorch_model.detection.results import to_results
    from pytorch_model.devices import choose_device, default_workers

    device = choose_device(options.device)
    files = _photographs(folder, options.batch_size)
    torch.manual_seed(0)
    detector = Detector(create_model(options.model).to(device))
    batch = detector.preprocess(files)
    images = list(itertools.islice(itertools.cycle(files), EVAL_IMAGES))
    speeds: dict[str, Speed] = {}

    def network() -> None:
        for start in range(0, len(images), options.batch_size):
            count = len(images[start : start + options.batch_size])
            detector.compute(batch._replace(images=batch.images[:count]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def piped(name: str, workers: int) -> Callable[[], None]:
        def run() -> None:
            pipeline = Pipeline(detector, batch_size=options.batch_size, workers=workers)
            for _ in pipeline.run(images, detector.load, lambda file, _, found: to_results(file.name, found)):
                pass
            speeds[name] = pipeline.speed

        return run

    sides: dict[str, Callable[[], Any]] = {"network alone": network}
    for workers in sorted({0, 1, 2, default_workers()}):
        name = f"pipeline, {workers} workers"
        sides[name] = piped(name, workers)
    network()  # the first run is always slower
    return _summarise(_side_by_side(sides, options.repeat), "network alone") | {
        "speeds": {name: speed.content() for name, speed in speeds.items()},
        "engine": detector.engine,
        "threads": torch.get_num_threads(),
    }


def _photographs(folder: Path, count: int) -> list[Path]:
    from PIL import Image

    from porting.synthetic import synthetic_image

    files = [folder / f"{seed}.jpg" for seed in range(count)]
    for seed, file in enumerate(files):
        Image.fromarray(synthetic_image(480, 640, seed)).save(file, quality=90)
    return files


def _summarise(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: {"median": median[name], "best": min(values)} for name, values in seconds.items()},
        "ratio": {name: value / median[base] for name, value in median.items()},
    }


def _draw(console: Console, figures: dict[str, Any]) -> None:
    table = Table("", "median s", "best s", "ratio of medians")
    for name, seconds in figures["seconds"].items():
        table.add_row(
            name, f"{seconds['median']:.4f}", f"{seconds['best']:.4f}", f"{figures['ratio'][name]:.2f}"
        )
    console.print(table)
    if "described" in figures:
        console.print(
            f"{figures['described']}: postprocessing (select and NMS) takes "
            f"{figures['postprocessing_over_network']:.2f} × the network"
        )
    for name, speed in figures.get("speeds", {}).items():
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in speed["seconds"].items())
        console.print(f"{name}, the last run: {speed['images_per_second']:.1f} images/s; {parts}")
    if "engine" in figures:
        console.print(
            f"{EVAL_IMAGES} images, engine {figures['engine']}, {figures['threads']} threads", markup=False
        )
    if "megabytes_kept" in figures:
        console.print(
            f"kept {figures['megabytes_kept']:.1f} MB; reading allocates "
            f"{figures['peak_megabytes']:.1f} MB at its peak, {figures['peak_over_kept']:.2f} × what is kept"
        )
    if figures.get("tensorflow_import_seconds"):
        console.print(
            f"importing TensorFlow took {figures['tensorflow_import_seconds']:.1f} s, not counted above"
        )
