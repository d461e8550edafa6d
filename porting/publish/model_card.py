"""The model card of a release: Markdown with YAML at its start, the form that model hubs read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from porting.convert import values_sentence
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.labels import find_names
from pytorch_model.engines import EAGER, computed_by
from pytorch_model.evaluation.figures import FIGURES
from pytorch_model.evaluation.metrics import Metrics
from pytorch_model.weights import BATCH_NORM_STATISTICS, MADE_UP

_SHOWN = FIGURES[:6]  # average precision; average recall is left out


def model_card(
    name: str,
    about: Mapping[str, Any],
    parity: Mapping[str, Any],
    metrics: Metrics | None,
    files: Mapping[str, tuple[int, str]],
) -> str:
    """The whole text.

    ``about``, ``parity``, ``metrics``: the content of ``config.json``, ``parity.json`` and
    ``coco_metrics.json``; ``files``: name → (bytes, SHA-256). Every number comes from one of them.
    """
    sections = (
        _front_matter(name, about["metadata"], metrics),
        _introduction(name, about),
        _loading(name, about, files),
        _evidence(parity),
        _figures(about["metadata"], metrics),
        _files(files),
    )
    return "\n".join(line for section in sections for line in section) + "\n"


def _front_matter(name: str, origin: Mapping[str, Any], metrics: Metrics | None) -> Iterator[str]:
    front: dict[str, Any] = {
        "license": origin["license"],
        "library_name": "pytorch",
        "pipeline_tag": "object-detection",
        "tags": ["efficientdet", "object-detection"],
    }
    if metrics:
        results = [{"type": figure, "value": value} for figure, value in _measured(metrics).items()]
        dataset = {"name": f"COCO annotations, {metrics.images} images", "type": "coco"}
        task = {"type": "object-detection"}
        front["model-index"] = [
            {"name": name, "results": [{"task": task, "dataset": dataset, "metrics": results}]}
        ]
    yield "---"
    yield yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip("\n")
    yield "---"


def _introduction(name: str, about: Mapping[str, Any]) -> Iterator[str]:
    config, origin = about["config"], about["metadata"]
    height, width = config["image_size"]
    values = f"the {values_sentence(origin['weights'])}"
    step = "" if origin["step"] is None else f", training step {origin['step']:,}"
    removed = origin["automl_parameters"] - origin["parameters"]
    yield f"\n# {name}\n"
    yield (
        f"{config['name']} for {config['num_classes']} classes on {height}×{width} pixels, ported from "
        f"TensorFlow: {values} of `{origin['source']}` ({origin['source_format']}{step}). The network is "
        "AutoML's EfficientDet (arXiv 1911.09070) without the convolution biases that a batch norm makes "
        "redundant."
    )
    published = origin["published_parameters_millions"]
    automl = origin["automl_parameters"]
    yield (
        f"\n- parameters: {origin['parameters']:,}; AutoML counts {automl:,}, {removed:,} of "
        f"them removed biases{f'; published: {published}M' if published else ''}"
    )
    if "resizer" in config:
        yield f"- input: images {EfficientDetConfig.from_dict(config).resizer}"
    yield f"- SHA-256 of the variables: `{origin['variables_sha256']}`"
    yield f"- written by {origin['tool']} {origin['tool_version']}"
    yield f"- licence of the weights: {origin['license']}"
    yield f"- classes: {_class_names(config)}"
    if origin.get(BATCH_NORM_STATISTICS) == MADE_UP:
        yield (
            "- batch-norm statistics: made up, because the source had folded them away; evaluation is not "
            "affected, but freeze or calibrate the batch norms before training"
        )
    if origin["assumed"]:
        yield f"- assumed, because the weights do not show it: {'; '.join(origin['assumed'])}"


def _class_names(config: Mapping[str, Any]) -> str:
    """Every class id with its name; without names, what detection assumes."""
    names = config.get("class_names")
    if names is None:
        assumed = find_names(None, config["num_classes"])
        return f"the weights hold no names; {assumed.source if assumed.assumed else 'give --labels'}"
    return ", ".join(f"{index} {_plain(name)}" for index, name in enumerate(names, start=1) if name)


def _plain(text: str) -> str:
    """``text`` without a meaning in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _loading(name: str, about: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    weights = next(file for file in files if file.endswith(".pth"))
    yield "\n## Loading\n"
    yield "```python"
    yield "from pytorch_model import EfficientDet"
    yield f'model = EfficientDet.from_pretrained("{name}")  # this folder'
    if about["config"]["name"].startswith("efficientdet-"):
        entry = about["config"]["name"].replace("-", "_")
        yield f'# or: torch.hub.load(REPOSITORY, "{entry}", weights="{name}/{weights}")'
    yield "```"


def _evidence(parity: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Parity with TensorFlow\n"
    yield (
        "Every layer was compared with a TensorFlow reference of AutoML's network on one image "
        f"({parity['metadata']['picture']}). Errors are relative L2. *Accumulated*: both networks run from "
        "the image. *Isolated*: our layer gets the reference's input. Details: `parity.html`.\n"
    )
    yield "| | activations | accumulated, worst | allowed | isolated, worst | allowed |"
    yield "|---|---|---|---|---|---|"
    for run in parity["runs"]:
        cells = [run["dtype"], str(run["activations"])]
        for kind in ("accumulated", "isolated"):
            cells += [f"{run['worst'][kind]['relative']:.1e}", f"{run['tolerances'][kind]:.0e}"]
        yield f"| {' | '.join(cells)} |"
    if sentence := parity.get("about_assumed"):  # releases of version 0.1.0 have none
        yield f"\nThe port is {sentence}."


def _figures(origin: Mapping[str, Any], metrics: Metrics | None) -> Iterator[str]:
    yield "\n## COCO figures\n"
    published = [
        f"{origin[key]} on {what}"
        for key, what in (("published_ap_val", "val2017"), ("published_ap_test_dev", "test-dev"))
        if origin[key] is not None
    ]
    if published:
        yield f"Google published an AP of {' and '.join(published)}, in percent, for this checkpoint."
    if not metrics:
        yield "These weights were not evaluated here."
        return
    ours = _measured(metrics)
    engine = computed_by(metrics.settings["ours"])
    how = "" if engine == EAGER else f", computed by {engine}"
    yield f"Measured with these weights, on {metrics.images} images{how} (`coco_metrics.json`):\n"
    yield f"| {' | '.join(ours)} |"
    yield "|---" * len(ours) + "|"
    yield f"| {' | '.join(f'{value:.4f}' for value in ours.values())} |"


def _measured(metrics: Metrics) -> dict[str, float]:
    """The figures that exist: COCO's evaluation gives -1 if nothing of that size is annotated."""
    ours = metrics.figures["ours"]
    return {name: ours[name] for name in _SHOWN if name in ours and ours[name] >= 0}


def _files(files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    yield "\n## Files\n"
    yield "| file | bytes | SHA-256 |"
    yield "|---|---|---|"
    for file, (size, digest) in files.items():
        yield f"| {file} | {size:,} | `{digest}` |"
