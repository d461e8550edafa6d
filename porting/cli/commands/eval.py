"""``eval``: evaluate weights on a data set, next to a reference, and print the figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from porting.cli.arguments.eval import EvalOptions
from porting.cli.commands.source import open_checkpoint
from porting.cli.drawing.evaluation import (
    figures_table,
    per_class_table,
    print_notes,
    print_parity,
    speed_note,
)
from porting.cli.drawing.progress import ImageBar
from porting.cli.process import EXIT_FAILED, end_at_once_on_signals, print_json
from porting.convert import convert
from porting.hparams import given_names, nms_and_size
from porting.parity.reference.choose import choose_reference, require_tensorflow
from porting.parity.reference.evaluation import reference_network
from pytorch_model import load_model
from pytorch_model.detection.detector import Detector
from pytorch_model.devices import choose_device, dtype_of, use_threads
from pytorch_model.engines import EAGER, computed_by
from pytorch_model.evaluation.classes import class_to_category, left_out
from pytorch_model.evaluation.dataset import Dataset, read_dataset
from pytorch_model.evaluation.processes import Processes, has_others, joined
from pytorch_model.evaluation.run import (
    EvaluationOptions,
    EvaluationResult,
    ReferenceNetwork,
    evaluate_dataset,
)


def run(options: EvalOptions) -> int:
    evaluation = EvaluationOptions(
        options.weights,
        options.out,
        options.batch_size,
        options.restart,
        options.per_class,
        options.test_dev,
        options.workers,
    )
    if has_others():
        end_at_once_on_signals()
    with joined() as processes:
        console = Console(stderr=options.json, highlight=False, quiet=not processes.is_first)
        with processes.first_ahead():
            dataset = read_dataset(options.coco, options.annotations, options.images, options.limit)
            detector = _detector(options, processes)
            config = detector.model.config
            own = given_names(options.hparams, config.num_classes) or config.class_names
            categories = class_to_category(dataset, config.num_classes, options.labels, own)
            reference = _reference(options, console, detector)
        several = f" (process 1 of {processes.count})" if processes.count > 1 else ""
        with ImageBar(console, f"detecting{several}") as bar:
            result = evaluate_dataset(
                detector,
                dataset,
                categories,
                evaluation,
                reference=reference,
                processes=processes,
                listener=bar,
            )
    if result is None:
        return 0
    _draw(options, console, detector, dataset, result, left_out(dataset, categories))
    console.print(
        f"{result.metrics.images} images, {bar.seconds:.1f} s{speed_note(result.speed)}; wrote {options.out}",
        markup=False,
        soft_wrap=True,
    )
    if options.json:
        print_json({**result.metrics.content(), "speed": result.speed.content()})
    return 0 if result.passed else EXIT_FAILED


def _detector(options: EvalOptions, processes: Processes) -> Detector:
    use_threads(options.threads)
    device = choose_device(options.device, processes.local_rank)
    model = load_model(options.weights).to(device, dtype_of(options.precision))
    nms, image_size = nms_and_size(options.hparams, model.config, options.nms)
    return Detector(
        model,
        image_size=image_size,
        nms=nms,
        decoder=options.decoder,
        tta=options.tta,
        engine=options.engine,
    )


def _reference(options: EvalOptions, console: Console, detector: Detector) -> ReferenceNetwork | None:
    """Raises :class:`EfficientDetError` if the reference cannot be run or does not fit the model."""
    if options.reference is None or options.source is None:
        return None
    require_tensorflow()
    kind, graph = options.reference.kind, options.reference.graph
    with open_checkpoint(options.source, console, options.out) as checkpoint:
        conversion = convert(checkpoint, detector.model.config, **vars(options.values))
        reference = choose_reference(kind, graph, checkpoint, conversion)
    return reference_network(kind, conversion, reference, detector)


def _draw(
    options: EvalOptions,
    console: Console,
    detector: Detector,
    dataset: Dataset,
    result: EvaluationResult,
    notes: Sequence[str],
) -> None:
    metrics = result.metrics
    decoders = ", ".join(f"{name} ({count})" for name, count in metrics.decoders.items())
    height, width = detector.image_size
    title = f"{detector.model.config.name} at {height}×{width}, {metrics.images} images, read by {decoders}"
    how = computed_by(metrics.settings["ours"])
    if how != EAGER:
        title += f", computed by {how}"
    if detector.nms.scope == "global":
        title += ", suppressed across classes"
    if detector.tta != "none":
        title += f", tta {detector.tta}"
    console.print(title, markup=False, soft_wrap=True)
    if detector.tta != "none" and detector.nms.is_soft:
        console.print(
            "flip also fuses the overlapping boxes that soft suppression keeps; use it with "
            "nms_configs.method=hard",
            style="yellow",
            soft_wrap=True,
        )
    if result.evaluations:
        ours, reference = result.evaluations["ours"], result.evaluations.get("reference")
        console.print(figures_table(ours, reference, options.reference.kind if options.reference else ""))
        if options.per_class:
            console.print(per_class_table(ours, reference, dataset.categories))
    else:
        console.print(f"{dataset.annotations.name} holds no annotations: no figures", markup=False)
    if result.parity:
        print_parity(console, result.parity, result.exact)
    print_notes(console, (*dataset.notes, *notes), result.outcome.unreadable, len(result.outcome.resized))
