"""Run an evaluation: detect in a data set, resume an interrupted run, compute figures, write the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytorch_model.detection.detector import Detector
from pytorch_model.detection.pipeline import Pipeline, Speed
from pytorch_model.detection.results import server_file_name, server_results
from pytorch_model.detection.run import SILENT, Listener
from pytorch_model.engines.choose import Network
from pytorch_model.errors import OutputError
from pytorch_model.evaluation.dataset import Dataset
from pytorch_model.evaluation.detection_parity import DetectionParity, compare_detections
from pytorch_model.evaluation.figures import Evaluation, evaluate
from pytorch_model.evaluation.metrics import Metrics
from pytorch_model.evaluation.processes import Processes
from pytorch_model.evaluation.shards import Shards
from pytorch_model.evaluation.streams import Outcome, Stream, detect_dataset, kept_batches, settings
from pytorch_model.files import locked, make_folder, save_json, sha256_of_file
from pytorch_model.weights.files import weight_file


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate and where to write.

    ``weights``: the file or folder that the detector's model was loaded from; its SHA-256 is noted.
    ``out``: the folder for the results. ``restart``: discard the results of an earlier run there.
    ``per_class``: also note the AP of each class. ``test_dev``: also write the file that COCO's server takes,
    for an algorithm of this name. ``batch_size``, ``workers``: see :class:`Pipeline`. Raises
    :class:`EfficientDetError` for a name that cannot be used.
    """

    weights: Path
    out: Path
    batch_size: int | None = None
    restart: bool = False
    per_class: bool = False
    test_dev: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.test_dev is not None:
            server_file_name(self.test_dev)


@dataclass(frozen=True)
class ReferenceNetwork:
    """A network to compare with.

    ``kind``: its name in the settings. ``weights``: SHA-256 of everything that its outputs depend on.
    ``exact``: it computes in float32, so its detections must equal ours.
    """

    kind: str
    network: Network
    weights: Sequence[str]
    exact: bool = True


@dataclass(frozen=True)
class EvaluationResult:
    """``evaluations``: ours, reference → figures; empty without annotations. ``parity``: with a reference.

    ``exact``: whether the reference is :attr:`ReferenceNetwork.exact`. ``speed``: of what this process
    computed, in this run.
    """

    outcome: Outcome
    evaluations: Mapping[str, Evaluation]
    parity: DetectionParity | None
    exact: bool
    metrics: Metrics
    speed: Speed

    @property
    def passed(self) -> bool:
        """Every image was read, and the detections are those of the reference if that is exact."""
        differs = self.parity is not None and self.exact and not self.parity.passed
        return not differs and not self.outcome.unreadable


def evaluate_dataset(
    detector: Detector,
    dataset: Dataset,
    categories: Mapping[int, int],
    options: EvaluationOptions,
    *,
    reference: ReferenceNetwork | None = None,
    processes: Processes | None = None,
    listener: Listener = SILENT,
) -> EvaluationResult | None:
    """Evaluate ``detector`` on ``dataset`` and write the files into ``options.out``.

    ``categories``: see :func:`class_to_category`. Writes ``detections.json`` (COCO results) and
    ``metrics.json``; with a ``reference`` also ``reference_detections.json``. The next call with the same
    arguments resumes from ``shards/`` there. With several ``processes``, call it in each; the result is None
    in all but the first. ``listener`` hears how many images are done. Raises :class:`EfficientDetError`; then
    the results of an earlier run are unchanged.
    """
    processes = processes or Processes()
    pipeline = Pipeline(detector, batch_size=options.batch_size, workers=options.workers)
    streams = _streams(pipeline, dataset, categories, options, reference)
    arguments = (pipeline, dataset, streams, categories, processes, listener.progress)
    if not processes.is_first:
        detect_dataset(*arguments)
        return None
    with _alone_in(options.out):
        if options.restart:
            _discard(options.out)
        for stream in streams:
            kept_batches(stream, dataset, pipeline.batch_size)
        outcome = detect_dataset(*arguments)
        assert outcome is not None  # of the first process
        return _conclude(dataset, streams, outcome, options, pipeline.speed)


def _streams(
    pipeline: Pipeline,
    dataset: Dataset,
    categories: Mapping[int, int],
    options: EvaluationOptions,
    reference: ReferenceNetwork | None,
) -> list[Stream]:
    shards, weights = options.out / "shards", sha256_of_file(weight_file(options.weights))
    of_ours = settings(pipeline.detector, dataset, pipeline.batch_size, categories, weights)
    streams = [Stream("ours", None, Shards(shards, "ours", of_ours))]
    if reference:
        of_reference = {**of_ours, "reference": reference.kind, "weights": list(reference.weights)}
        kept = Shards(shards, "reference", of_reference)
        streams.append(Stream("reference", reference.network, kept, reference.exact))
    return streams


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Create ``out`` and keep other evaluations out of it.

    Raises :class:`OutputError` if it cannot be created or another evaluation is running in it.
    """

    def busy() -> None:
        raise OutputError(f"another evaluation is running in {out}; wait for it, or choose another --out")

    make_folder(out)
    make_folder(out / "shards")
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / ".lock", busy))
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot write in {out}: {reason}; choose another folder") from None
        yield


def _discard(out: Path) -> None:
    """Remove all that an earlier run wrote, so that none of it stays next to the new results.

    Raises :class:`OutputError` if the disk refuses.
    """
    for name in ("ours", "reference"):
        Shards(out / "shards", name, {}).clear()
    files = [out / name for name in ("metrics.json", "detections.json", "reference_detections.json")]
    try:
        for file in (*files, *out.glob("detections_test-dev2017_*_results.json")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}; choose another --out") from None


def _conclude(
    dataset: Dataset,
    streams: Collection[Stream],
    outcome: Outcome,
    options: EvaluationOptions,
    speed: Speed,
) -> EvaluationResult:
    """Compute the figures and write the files."""
    ours, reference = outcome.results["ours"], outcome.results.get("reference")
    save_json(options.out / "detections.json", ours)
    if reference is not None:
        save_json(options.out / "reference_detections.json", reference)
    if options.test_dev is not None:
        save_json(options.out / server_file_name(options.test_dev), server_results(ours))
    evaluations = {
        stream.name: evaluate(dataset.content, outcome.results[stream.name], outcome.evaluated)
        for stream in streams
        if dataset.has_ground_truth
    }
    parity = compare_detections(ours, reference) if reference is not None else None
    per_class = {name: evaluation.per_class for name, evaluation in evaluations.items()}
    metrics = Metrics(
        figures={name: evaluation.figures for name, evaluation in evaluations.items()},
        images=len(outcome.evaluated),
        settings={stream.name: stream.shards.settings for stream in streams},
        per_class=per_class if options.per_class else None,
        detection_parity=parity.figures() if parity else None,
        skipped={str(image): reason for image, reason in outcome.unreadable.items()},
        size_differs=outcome.resized,
        decoders=dict(outcome.decoders),
    )
    save_json(options.out / "metrics.json", metrics.content())
    exact = all(stream.exact for stream in streams)
    return EvaluationResult(outcome, evaluations, parity, exact, metrics, speed)
