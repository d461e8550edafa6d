"""``verify``: prove weights against a checkpoint, or compare two sets of weights, and print the verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.cli.arguments.verify import ALL, CompareOptions, VerifyOptions
from porting.cli.commands.source import find_config, open_checkpoint, print_run_config
from porting.cli.process import EXIT_FAILED, print_json
from porting.convert import Conversion, convert, read_raw_variables
from porting.infer import Inference, setting_lines
from porting.parity.compared_weights import ComparedWeights, read_weight_file
from porting.parity.weight_comparison import (
    CheckpointComparison,
    WeightComparison,
    check_same_network,
    compare_weights,
    compare_with_checkpoint,
)
from pytorch_model.config import EfficientDetConfig
from pytorch_model.devices import choose_device
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import chosen_engine
from pytorch_model.files import make_folder
from pytorch_model.weights import SUFFIXES
from pytorch_model.weights.files import read_weights


def run(options: VerifyOptions | CompareOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    if isinstance(options, CompareOptions):
        return _compare(options, console)
    return _verify(options, console)


# --- both networks ------------------------------------------------------------------------------------


def _verify(options: VerifyOptions, console: Console) -> int:
    device = choose_device(options.device)
    engines = dict.fromkeys(chosen_engine(name, device) for name in options.engines)
    options = dataclasses.replace(options, engines=tuple(engines))
    if options.report:
        make_folder(options.report)
    with open_checkpoint(options.source, console, Path()) as checkpoint:
        print_run_config(console, checkpoint)
        inference = find_config(options.model, checkpoint)
        config = inference.config
        weights, about = _read_weights(options.weights, checkpoint, config) if options.weights else (None, {})
        conversion = convert(checkpoint, (weights and weights.config) or config, **vars(options.values))
        assumed = still_assumed(inference, conversion, about)
        same = None
        if weights is not None:
            name = f"{checkpoint.source} ({conversion.values_kind})"
            same = compare_weights(weights, ComparedWeights(name, conversion.state_dict, config))
        passed, figures = _prove(options, console, device, checkpoint, conversion, assumed, weights, same)
    if same is not None:
        _print_comparison(console, same)
        passed = passed if same.same_function else False
        figures["weights"] = {"verdict": same.verdict.value, "notes": same.notes}
    if options.gradients:
        right, figures["gradients"] = _compare_gradients(console, conversion)
        passed = passed is not False and right
    if options.json:
        print_json({"passed": passed, **figures})
    return EXIT_FAILED if passed is False else 0


def _read_weights(
    path: Path, checkpoint: Checkpoint, config: EfficientDetConfig
) -> tuple[ComparedWeights, dict[str, str]]:
    """The weights and their metadata.

    Raises :class:`EfficientDetError` unless they fit their configuration, and that the checkpoint's.
    """
    state_dict, stored, about = read_weights(path)
    weights = ComparedWeights(str(path), state_dict, stored)
    check_same_network(weights, ComparedWeights(checkpoint.source, {}, config))
    EfficientDet.from_state_dict(state_dict, stored, str(path))
    return weights, about


def _prove(
    options: VerifyOptions,
    console: Console,
    device: torch.device,
    checkpoint: Checkpoint,
    conversion: Conversion,
    assumed: tuple[str, ...],
    weights: ComparedWeights | None,
    same: WeightComparison | None,
) -> tuple[bool | None, dict[str, object]]:
    """Whether the layers agree (None: not judged), and the figures."""
    from porting.cli.drawing.engines import print_engines
    from porting.cli.drawing.proof import ProofLines, print_precisions, print_verdict
    from porting.parity import prove
    from porting.parity.engines.proof import EngineComparison, ReferenceHeads
    from porting.parity.inputs import verification_size
    from porting.parity.precision import PRECISIONS, QUICK_PRECISIONS, measure_precisions
    from porting.parity.reference.choose import choose_reference
    from porting.parity.report.from_proof import build_report, write_report
    from porting.parity.report.thumbnails import Thumbnails

    config = conversion.config
    state_dict = conversion.state_dict if weights is None else weights.state_dict
    reference = choose_reference(options.reference.kind, options.reference.graph, checkpoint, conversion)
    images = _images(config, verification_size(config, options.size, reference), options.image)
    comparison = EngineComparison(EfficientDet.from_state_dict(state_dict, config).to(device), images)
    for name in options.engines:  # before the proof: one that cannot compute here ends the command at once
        with console.status(f"running the engine {name} …"):
            comparison.run(name)
    thumbnails = Thumbnails() if options.report else None
    heads = ReferenceHeads(thumbnails)
    with ProofLines(console) as lines:
        proof = prove(
            conversion,
            images,
            reference,
            lines,
            state_dict=state_dict,
            raw_variables=read_raw_variables(checkpoint, conversion),
            device=device,
            observe=heads,
            assumed=assumed,
        )
    print_verdict(console, proof)
    if options.engines:
        judged = all(result.judged for result in proof.results)
        proof = dataclasses.replace(proof, engines=comparison.results(heads.outputs, judged))
        print_engines(console, proof.engines)
    if options.precision:
        names = PRECISIONS if options.precision == ALL else QUICK_PRECISIONS
        costs = measure_precisions(config, state_dict, images, str(device), names)
        proof = print_precisions(console, costs, proof)
    if options.report:
        origin = {
            "checkpoint": options.source.ckpt,
            "weights": str(options.weights) if options.weights else "ported in memory",
            "reference": proof.reference,
        }
        report = build_report(
            proof,
            conversion,
            origin=origin,
            environment={"device": options.device, "torch": torch.__version__},
            image=options.image,
            comparison=same,
            thumbnails=thumbnails,
        )
        page = write_report(report, options.report)
        console.print(f"[bold]wrote[/] {escape(str(page))}", soft_wrap=True)
    return proof.passed, proof.figures()


def still_assumed(inference: Inference, conversion: Conversion, about: Mapping[str, str]) -> tuple[str, ...]:
    """Settings of the network that nobody stated, neither now nor when the weights were ported.

    ``about``: the metadata of the weights, empty if they were ported just now.
    """
    lines = setting_lines(conversion.config, inference.unseen)
    then = about.get("assumed", "")
    is_list = then.startswith("[")  # of JSON
    return tuple(line for line in lines if not is_list or json.dumps(line) in then)


def _images(config: EfficientDetConfig, size: tuple[int, int], image: Path | None) -> np.ndarray:
    from porting.parity.inputs import image_file, seeded_images

    return seeded_images(config, size) if image is None else image_file(config, size, image)


def _print_comparison(console: Console, comparison: WeightComparison) -> None:
    """Differences below the tolerances of activations: a slightly wrong number, other settings."""
    if not comparison.same_function:
        console.print(
            f"[red bold]FAILED[/] {escape(comparison.explanation)} They are not the port of this checkpoint.",
            soft_wrap=True,
        )
    for note in comparison.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def _compare_gradients(console: Console, conversion: Conversion) -> tuple[bool, dict[str, object]]:
    """Whether all gradients agree, and the figures."""
    from porting.cli.drawing.gradients import print_gradients
    from porting.parity.gradients import IMAGE_COUNT, gradient_figures, gradient_size, prove_gradients

    height, width = gradient_size(conversion.config)
    console.print(
        f"\n[bold]gradients[/] of one scalar, float64, {IMAGE_COUNT} seeded {height}×{width} images"
    )
    with console.status("") as status:
        results = prove_gradients(
            conversion,
            lambda mode: status.update(f"both networks, forward and backward, batch norm in {mode} …"),
        )
    print_gradients(console, results)
    return all(result.passed for result in results.values()), gradient_figures(results)


# --- two sets of weights ------------------------------------------------------------------------------


def _compare(options: CompareOptions, console: Console) -> int:
    weights = read_weight_file(options.weights)
    comparison: WeightComparison | CheckpointComparison
    if Path(options.against.ckpt).suffix in (*SUFFIXES, ".pt"):
        comparison = details = compare_weights(weights, read_weight_file(options.against.ckpt))
        same = comparison.same_function
    else:
        with open_checkpoint(options.against, console, Path()) as checkpoint:
            config = find_config(options.model, checkpoint).config
            comparison = compare_with_checkpoint(weights, checkpoint, config)
        details, same = comparison.nearest, comparison.passed
    mark = "[green bold]same function[/]" if same else "[red bold]DIFFERENT[/]"
    console.print(f"{mark} {escape(comparison.explanation)}", soft_wrap=True)
    changed = [row for row in details.differing if not row.same_function]
    if not same and changed:
        _print_changed(console, details)
    for note in details.notes:
        console.print(escape(note), soft_wrap=True)
    if options.json:
        stored_differently = [row.key for row in details.differing if row.same_function]
        print_json(
            {
                "same_function": same,
                "explanation": comparison.explanation,
                "differing": [row.key for row in changed],
                "stored_differently": stored_differently,
            }
        )
    return 0 if same else EXIT_FAILED


def _print_changed(console: Console, comparison: WeightComparison) -> None:
    changed = [row for row in comparison.differing if not row.same_function]
    table = Table("tensor", "shape", "relative L2", "largest", "its part of the network")
    for row in changed[:20]:
        shape = "×".join(map(str, row.shape))
        figures = f"{row.difference.relative:.1e}", f"{row.difference.maximum:.1e}"
        table.add_row(row.key, shape, *figures, f"{row.part}: {row.part_difference.relative:.1e}")
    console.print(table)
    if others := len(comparison.differing) - len(changed):
        console.print(f"{others} more are stored differently, which changes no part by more than rounding")
