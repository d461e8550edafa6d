"""Weights whose batch-norm statistics are made up: they say so, and new statistics keep their function."""

from __future__ import annotations

import copy
import json
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.helpers.small_models import one_of_each_layer
from parity_tests.helpers.tflite_files import TINY, golden
from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.renamed import Renamed, Source
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import apply_rules, convert, write_conversion
from porting.rules import rules
from porting.synthetic import synthetic_variables
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.training import calibration as module
from pytorch_model.training.calibration import split_batch_norms_again, statistics_are_made_up
from pytorch_model.training.losses import DetectionLoss, LossSettings, detection_loss
from pytorch_model.training.targets import label_anchors
from pytorch_model.weights.files import read_weights

KEPT = 1e-4  # how far outputs may move


# --- the metadata ----------------------------------------------------------------------------------------


def metadata_of(checkpoint: Checkpoint, config: EfficientDetConfig, folder: Path) -> dict[str, str]:
    path = folder / "weights.safetensors"
    write_conversion(convert(checkpoint, config), checkpoint, [], path)
    return read_weights(path)[2]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_weights_from_tflite_say_that_statistics_are_made_up(kind: str, tmp_path: Path) -> None:
    with open_checkpoint(golden(kind)) as checkpoint:
        assert statistics_are_made_up(metadata_of(checkpoint, TINY, tmp_path))
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(golden(kind), "model.tflite")
    with open_checkpoint(archive) as checkpoint:
        assert statistics_are_made_up(metadata_of(checkpoint, TINY, tmp_path))
        renamed = Renamed(checkpoint, {name: Source(name) for name in checkpoint}, "renamed")
        assert statistics_are_made_up(metadata_of(renamed, TINY, tmp_path))


def test_other_weights_do_not(tmp_path: Path) -> None:
    config = one_of_each_layer()
    prefix = tmp_path / "model.ckpt-0"
    write_bundle(prefix, synthetic_variables(config))
    with open_checkpoint(prefix) as checkpoint:
        assert not statistics_are_made_up(metadata_of(checkpoint, config, tmp_path))


def test_an_older_file_is_known_by_its_source() -> None:
    assert statistics_are_made_up({"source_format": json.dumps("TFLite, int8")})
    assert not statistics_are_made_up({"source_format": json.dumps("TensorFlow V2 checkpoint")})
    assert not statistics_are_made_up({})


# --- the function ----------------------------------------------------------------------------------------


def outputs_of(model: EfficientDet, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        classes, boxes = model(images)
    return classes + boxes


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def seeded_images(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def made_up(config: EfficientDetConfig) -> EfficientDet:
    """Every kind of layer, with statistics that fit no input."""
    model = EfficientDet(config).double().eval()
    model.load_state_dict(apply_rules(rules(config), synthetic_variables(config), "float64"))
    random = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert norm.running_var is not None
        assert norm.running_mean is not None
        norm.running_var.mul_(torch.rand(norm.num_features, generator=random, dtype=torch.float64) + 0.5)
        norm.running_mean.add_(torch.randn(norm.num_features, generator=random, dtype=torch.float64) * 0.1)
    return model


def test_the_function_stays_and_the_statistics_are_the_inputs() -> None:
    model = made_up(one_of_each_layer())
    batches = [seeded_images(2, 160, seed).double() for seed in range(3)]
    seen = seeded_images(2, 192, 9).double()
    before = outputs_of(model, seen)
    split_batch_norms_again(model, batches)
    assert apart(before, outputs_of(model, seen)) < 1e-10
    inputs: dict[str, list[Tensor]] = {}
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, torch.nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, x, key=name: inputs.setdefault(key, []).append(x[0]))
    for images in batches:
        outputs_of(model, images)
    for name, norm in norms.items():
        means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs[name]]).mean(dim=0)
        variances = torch.stack([x.var(dim=(0, 2, 3), correction=0) for x in inputs[name]]).mean(dim=0)
        torch.testing.assert_close(norm.running_mean, means, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(norm.running_var, variances, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_mode_and_hooks_are_as_before(training: bool) -> None:
    model = made_up(one_of_each_layer()).train(training)
    counters = {key: tensor.clone() for key, tensor in model.state_dict().items() if "num_batches" in key}
    with pytest.raises(RuntimeError):  # an error half way
        split_batch_norms_again(model, [seeded_images(1, 160, 0).double(), torch.zeros(1, 1, 8, 8).double()])
    assert model.training == training
    assert not any(m._forward_pre_hooks for m in model.modules())
    split_batch_norms_again(model, [seeded_images(1, 160, 0).double()])
    assert model.training == training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(model.state_dict()[key], counter) for key, counter in counters.items())


def test_what_no_batch_reaches_stays() -> None:
    """Blocks above the last level, and everything if there is no batch."""
    model = made_up(one_of_each_layer().replace(max_level=4))
    before = copy.deepcopy(model.state_dict())
    split_batch_norms_again(model, [])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    split_batch_norms_again(model, [seeded_images(2, 160, 0).double()])
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_a_wrong_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shift of beta, outputs move."""
    plain = module._split

    def wrong(norm: torch.nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        bias = norm.bias.detach().clone()
        plain(norm, mean, variance)
        with torch.no_grad():
            norm.bias.copy_(bias)

    monkeypatch.setattr(module, "_split", wrong)
    model, seen = made_up(one_of_each_layer()), seeded_images(2, 160, 9).double()
    before = outputs_of(model, seen)
    split_batch_norms_again(model, [seeded_images(2, 160, 0).double()])
    assert apart(before, outputs_of(model, seen)) > KEPT


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_tflite_file_keeps_its_function(kind: str) -> None:
    with open_checkpoint(golden(kind)) as checkpoint:
        model = EfficientDet.from_state_dict(convert(checkpoint, TINY).state_dict, TINY)
    height, width = TINY.image_size
    seen = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    before = outputs_of(model, seen)
    split_batch_norms_again(model, [seen[:2], seen[2:]])
    assert apart(before, outputs_of(model, seen)) <= KEPT


# --- the public Lite0 ------------------------------------------------------------------------------------

LITE0 = model_config("efficientdet-lite0")


@cache
def coco(shared: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first images at 320 pixels, normalised, with their boxes: [N, 3, H, W], [N, M, 4], [N, M]."""
    from PIL import Image

    about = json.loads((shared / "coco" / "instances_val2017_158.json").read_text())
    images, boxes, classes = [], torch.zeros(count, 100, 4), torch.full((count, 100), -1)
    for index, entry in enumerate(about["images"][:count]):
        scale = 320 / max(entry["height"], entry["width"])
        size = int(entry["width"] * scale), int(entry["height"] * scale)
        with Image.open(shared / "coco" / "val2017" / entry["file_name"]) as opened:
            pixels = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float32)
        image = torch.zeros(3, 320, 320)
        image[:, : size[1], : size[0]] = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)
        images.append(image)
        found = [a for a in about["annotations"] if a["image_id"] == entry["id"] and not a["iscrowd"]][:100]
        for row, annotation in enumerate(found):
            x, y, width, height = (scale * value for value in annotation["bbox"])
            boxes[index, row] = torch.tensor([y, x, y + height, x + width])
            classes[index, row] = annotation["category_id"]
    return torch.stack(images), boxes, classes


def first_step(model: EfficientDet, data: tuple[Tensor, Tensor, Tensor]) -> DetectionLoss:
    """The loss with the statistics of the batch, as training computes it."""
    images, boxes, classes = data
    anchors = generate_anchors(LITE0)
    targets = label_anchors(anchors, boxes, classes)
    with torch.no_grad():
        outputs = copy.deepcopy(model).train()(images)
    normaliser = float(targets.positives.sum()) + 1
    return detection_loss(outputs[0], outputs[1], targets, normaliser, LossSettings(), anchors)


def calibrated(shared: Path) -> dict[str, np.ndarray]:
    """The shared checkpoint's variables with the statistics that were calibrated for it."""
    with open_checkpoint(shared / "lite0" / "efficientdet-lite0") as checkpoint:
        variables = dict(convert(checkpoint, LITE0).variables)
    with np.load(shared / "lite0" / "calibrated_bn.npz") as stored:
        return {**variables, **{name: stored[name] for name in stored.files}}


def test_the_formula_is_that_of_the_calibrated_lite0(shared: Path) -> None:
    """Given its means and variances, gamma and beta come out."""
    with open_checkpoint(shared / "lite0" / "efficientdet-lite0") as checkpoint:
        model = EfficientDet.from_state_dict(convert(checkpoint, LITE0).state_dict, LITE0).double()
    expected = apply_rules(rules(LITE0), calibrated(shared), "float64")
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, torch.nn.BatchNorm2d)}
    assert len(norms) == 108
    for name, norm in norms.items():
        module._split(norm, expected[f"{name}.running_mean"], expected[f"{name}.running_var"])
        for leaf in ("weight", "bias"):
            theirs = expected[f"{name}.{leaf}"]  # float32, a difference of larger numbers
            error = float((norm.state_dict()[leaf] - theirs).norm() / theirs.norm())
            assert error < 1e-5, f"{name}.{leaf}"


def test_lite0_from_its_int8_file(shared: Path) -> None:
    """The outputs stay, and the first training step begins where the calibrated checkpoint's does."""
    with open_checkpoint(shared / "lite0" / "efficientdet_lite0.tflite") as checkpoint:
        model = EfficientDet.from_state_dict(convert(checkpoint, LITE0).state_dict, LITE0)
    images, boxes, classes = coco(shared, 40)
    batch = images[:8], boxes[:8], classes[:8]
    before, lost = outputs_of(model, images[:2]), first_step(model, batch)
    split_batch_norms_again(model, torch.tensor_split(images[8:], 4))
    assert apart(before, outputs_of(model, images[:2])) <= KEPT
    theirs = EfficientDet.from_state_dict(apply_rules(rules(LITE0), calibrated(shared)), LITE0)
    ours, google = first_step(model, batch), first_step(theirs, batch)
    print({"before": lost.boxes.item(), "after": ours.boxes.item(), "calibrated": google.boxes.item()})
    assert ours.boxes <= 1.2 * google.boxes
    assert lost.boxes > 2 * ours.boxes
