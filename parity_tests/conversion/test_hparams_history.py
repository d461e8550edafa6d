"""Every hyper-parameter that AutoML ever had: the table, and the defaults of its states since the first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from parity_tests.helpers.configs import AUTOML_DEFAULTS
from porting.hparams import read_hparams
from porting.hparams.history import (
    HPARAMS,
    LATEST,
    NAMES,
    RUNNING,
    SUPPRESSION,
    TRAINING,
    WEIGHTS,
    with_effect,
)
from porting.hparams.meaning import FIELDS, FIXED, IGNORED


def test_the_table_of_all_names_agrees_with_what_is_read() -> None:
    special = {"fpn_name", "name", "nms_configs", "scale_range"}
    assert {*FIELDS, *FIXED, *IGNORED, *special} == set(HPARAMS)
    assert set(FIXED) | {"fpn_name", "name"} <= with_effect(WEIGHTS)
    assert with_effect(NAMES, RUNNING, SUPPRESSION, TRAINING) - {"nms_configs"} == IGNORED
    assert not set(FIELDS) & with_effect(NAMES, RUNNING, SUPPRESSION, TRAINING)
    for name, hparam in HPARAMS.items():
        assert re.fullmatch(r"202[01](-[01][0-9])?", hparam.since), name
        assert hparam.since <= hparam.until <= LATEST, name


# What AutoML's own default_detection_configs held in some months, as far as it differs from AUTOML_DEFAULTS:
# names and values that were there, and names that were not.
_PAIRS = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
_FIRST: dict[str, Any] = {  # the names of all states up to 2020-05, with other values or gone later
    "aspect_ratios": _PAIRS,
    "image_size": 640,
    "pooling_type": None,
    "resnet_depth": 50,
    "train_scale_max": 2.0,
    "train_scale_min": 0.1,
    "use_bfloat16": True,
    "use_native_resize_op": False,
}
_LATER = """
    dataset_type drop_remainder grad_checkpoint grid_mask heads img_summary_steps iou_loss_type
    iou_loss_weight jitter_max jitter_min label_map label_smoothing loss_scale map_freq
    max_instances_per_image mean_rgb mixed_precision model_optimizations nms_configs optimizer
    positives_momentum regenerate_source_id
    sample_image save_freq scale_range seg_num_classes skip_mismatch stddev_rgb strategy target_size
    tflite_max_detections use_keras_model verbose
""".split()  # noqa: SIM905
_SPRING = [
    "act_type",
    "conv_bn_act_pattern",
    "data_format",
    "fpn_weight_method",
    "poly_lr_power",
    "var_freeze_expr",
]
_NMS_2020 = {"method": "gaussian", "iou_thresh": None, "score_thresh": None, "sigma": None}
_AUTUMN: dict[str, Any] = {
    "augmix_params": (3, -1, 1),
    "aspect_ratios": _PAIRS,
    "nms_configs": {**_NMS_2020, "max_nms_inputs": 0, "max_output_size": 100},
    "use_augmix": False,
}
_NOT_YET = [
    *("drop_remainder", "grad_checkpoint", "grid_mask", "loss_scale", "map_freq", "mean_rgb"),
    *("model_optimizations", "save_freq", "scale_range", "stddev_rgb", "tflite_max_detections", "verbose"),
]
STATES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "2020-03": ({**_FIRST, "conv_bn_relu_pattern": False}, _LATER + _SPRING),
    "2020-03 of a D6": ({**_FIRST, "fpn_name": "bifpn_sum", "name": "efficientdet-d6"}, _LATER + _SPRING),
    "2020-05": (
        {**_FIRST, "label_id_mapping": None, "use_tpu": True, "var_exclude_expr": ".*/class-predict/.*"},
        _LATER,
    ),
    "2020-05 with all names of that year": (
        {
            **_FIRST,
            "precision": None,
            "use_native_resize_op": True,
            "label_id_mapping": {1: "a", 2: "b"},
            "use_horovod": False,
            "enable_ema": True,
            "batch_size": 64,
            "iou_threshold": 0.5,
            "gradient_checkpointing": False,
            "gradient_checkpointing_list": ["Add"],
            "nvgpu_logging": False,
            "min_score_thresh": 0.4,
            "max_boxes_to_draw": 200,
            "nms": "gaussian",
            "fpn_name": "bifpn_dyn",
        },
        _LATER,
    ),
    "2020-08": (
        {
            **_AUTUMN,
            "label_id_mapping": None,
            "train_scale_max": 2.0,
            "train_scale_min": 0.1,
            "resnet_depth": 50,
            "use_keras_model": None,
        },
        [
            *_NOT_YET,
            "jitter_max",
            "jitter_min",
            "label_map",
            "sample_image",
            "target_size",
            "dataset_type",
            "positives_momentum",
        ],
    ),
    "2020-10": (
        {**_AUTUMN, "each_epoch_in_separate_process": False, "label_map": "coco", "resnet_depth": 50},
        [*_NOT_YET, "dataset_type", "positives_momentum"],
    ),
    "2020-12": (
        {
            **_AUTUMN,
            "aspect_ratios": [1.0, 2.0, 0.5],
            "augmix_params": [3, -1, 1],
            "device": {"grad_ckpting": False, "grad_ckpting_list": ["Add_", "AddN"], "nvgpu_logging": False},
        },
        [name for name in _NOT_YET if name not in ("drop_remainder", "grid_mask")],
    ),
    "2021-01": ({"label_map": {1: "text", 2: "button"}}, ["scale_range", "save_freq", "verbose"]),
    "2021-05": ({}, []),
    "2021-11": ({}, ["model_optimizations"]),
    "tf2/train.py": (
        {
            "batch_size": 64,
            "debug": False,
            "eval_samples": 5000,
            "mode": "traineval",
            "profile": None,
            "model_dir": "/x",
            "model_name": "efficientdet-d1",
            "num_shards": 1,
            "steps_per_epoch": 10,
            "steps_per_execution": 1,
            "testdev_dir": None,
            "tf_random_seed": None,
            "val_json_file": None,
            "strategy": "",
        },
        ["model_optimizations"],
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_the_defaults_of_every_state_are_read(state: str, tmp_path: Path) -> None:
    """Dumped as AutoML dumps them. What they say of the network is D1's (or D6's) own."""
    changed, absent = STATES[state]
    values = {name: value for name, value in AUTOML_DEFAULTS.items() if name not in absent} | changed
    month = state.split()[0]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump(values))
    for name in values:
        hparam = HPARAMS[name]
        if month.startswith("20"):
            assert hparam.since <= month <= hparam.until or hparam.until == "2020", name
    read = read_hparams(str(path))
    assert read.model == values["name"]
    assert set(read.ignored) >= {"learning_rate", "momentum"}
    assert read.overrides.get("fpn_weight_method", "fastattn") == ("sum" if "D6" in state else "fastattn")
    ratios = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4)) if values["aspect_ratios"] is _PAIRS else (1.0, 2.0, 0.5)
    assert read.overrides["aspect_ratios"] == ratios


@pytest.mark.parametrize("trainer", ["tf1", "tf2"])
def test_what_automl_s_own_trainers_wrote_is_read(trainer: str, shared: Path) -> None:
    read = read_hparams(str(shared / f"exports/cfg_{trainer}.yaml"))
    assert read.model == "efficientdet-d0"
    assert read.overrides["image_size"] == (480, 640)
    assert (read.overrides["num_classes"], read.overrides["survival_prob"]) == (1, 0.8)
