"""Every hyper-parameter that AutoML's EfficientDet has had: what it acts on, and when it was there.

Source: AutoML ``hparams_config.py`` in copies from its first month to its last state, ``det_model_fn.py``,
and the flags that ``main.py`` and ``tf2/train.py`` add to the parameters of a run. The months are those of
the copies: a name may be some weeks older, and may have stayed some weeks longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

WEIGHTS = "weights"  # the network: its variables, or what it computes with them
INPUT = "input"  # what the network sees of an image
ANCHORS = "anchors"  # the boxes that the outputs are relative to
SUPPRESSION = "suppression"  # which detections are kept
NAMES = "names"  # of the classes
TRAINING = "training"  # how the weights were found, and how well
RUNNING = "running"  # on which machine, with which files, how verbosely

LATEST = "2021-11"  # the last state


class Hparam(NamedTuple):
    """One hyper-parameter. ``since``, ``until``: year and month, or only the year if no more is known."""

    effect: str
    since: str
    until: str


#: (effect, since, until, names).
_ROWS = (
    (
        WEIGHTS,
        "2020-03",
        LATEST,
        "apply_bn_for_resampling backbone_config backbone_name box_class_repeats conv_after_downsample "
        "fpn_cell_repeats fpn_config fpn_name fpn_num_filters max_level min_level name num_classes "
        "separable_conv survival_prob",
    ),
    (WEIGHTS, "2020-03", "2020-03", "conv_bn_relu_pattern"),
    (WEIGHTS, "2020-03", "2020-05", "pooling_type use_native_resize_op"),
    (WEIGHTS, "2020-05", LATEST, "act_type conv_bn_act_pattern fpn_weight_method"),
    (WEIGHTS, "2020-08", LATEST, "heads"),
    (WEIGHTS, "2021-01", "2021-05", "model_optimizations"),
    (INPUT, "2020-03", LATEST, "image_size"),
    (INPUT, "2021-01", LATEST, "mean_rgb stddev_rgb"),
    (INPUT, "2021-05", LATEST, "scale_range"),
    (ANCHORS, "2020-03", LATEST, "anchor_scale aspect_ratios num_scales"),
    (SUPPRESSION, "2020", "2020", "iou_threshold max_boxes_to_draw min_score_thresh nms"),
    (SUPPRESSION, "2020-08", LATEST, "nms_configs"),
    (SUPPRESSION, "2021-01", LATEST, "tflite_max_detections"),
    (NAMES, "2020-05", "2020-08", "label_id_mapping"),
    (NAMES, "2020-10", LATEST, "label_map"),
    (
        TRAINING,
        "2020-03",
        LATEST,
        "alpha autoaugment_policy box_loss_weight ckpt_var_scope clip_gradients_norm delta "
        "first_lr_drop_epoch gamma input_rand_hflip is_training_bn learning_rate lr_decay_method "
        "lr_warmup_epoch lr_warmup_init momentum moving_average_decay num_epochs second_lr_drop_epoch "
        "skip_crowd_during_training weight_decay",
    ),
    (TRAINING, "2020-03", "2020-08", "train_scale_max train_scale_min"),
    (TRAINING, "2020-03", "2020-10", "resnet_depth"),
    (TRAINING, "2020-05", "2020-05", "var_exclude_expr"),
    (TRAINING, "2020-05", LATEST, "poly_lr_power var_freeze_expr"),
    (TRAINING, "2020", "2020", "enable_ema"),
    (TRAINING, "2020-08", "2020-12", "augmix_params use_augmix"),
    (
        TRAINING,
        "2020-08",
        LATEST,
        "img_summary_steps iou_loss_type iou_loss_weight label_smoothing max_instances_per_image optimizer "
        "regenerate_source_id seg_num_classes skip_mismatch",
    ),
    (TRAINING, "2020-10", LATEST, "dataset_type jitter_max jitter_min positives_momentum target_size"),
    (TRAINING, "2020-12", LATEST, "drop_remainder grid_mask"),
    (TRAINING, "2021-01", LATEST, "loss_scale"),
    (RUNNING, "2020-03", "2020-05", "use_bfloat16"),
    (RUNNING, "2020-05", "2020-05", "use_tpu"),
    (RUNNING, "2020-05", LATEST, "data_format"),
    (
        RUNNING,
        "2020",
        "2020",
        "gradient_checkpointing gradient_checkpointing_list nvgpu_logging precision use_horovod",
    ),
    (RUNNING, "2020-08", LATEST, "mixed_precision strategy use_keras_model"),
    (RUNNING, "2020-10", "2020-10", "each_epoch_in_separate_process"),
    (RUNNING, "2020-10", LATEST, "sample_image"),
    (RUNNING, "2020-12", "2020-12", "device"),
    (RUNNING, "2021-01", LATEST, "grad_checkpoint map_freq"),
    (RUNNING, "2021-05", LATEST, "save_freq verbose"),
    (  # flags of main.py and tf2/train.py
        RUNNING,
        "2020-03",
        LATEST,
        "backbone_ckpt batch_size ckpt debug eval_batch_size eval_samples iterations_per_loop mode model_dir "
        "model_name num_examples_per_epoch num_shards pretrained_ckpt profile steps_per_epoch "
        "steps_per_execution testdev_dir tf_random_seed train_batch_size val_json_file",
    ),
)

HPARAMS: Mapping[str, Hparam] = {
    name: Hparam(effect, since, until) for effect, since, until, names in _ROWS for name in names.split()
}


def with_effect(*effects: str) -> frozenset[str]:
    """The names with one of these effects."""
    return frozenset(name for name, hparam in HPARAMS.items() if hparam.effect in effects)
