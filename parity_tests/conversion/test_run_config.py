"""``config.yaml`` beside a checkpoint: where it is looked for, what it states, and what contradicts it."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from parity_tests.helpers.configs import AUTOML_DEFAULTS as DEFAULTS
from parity_tests.helpers.object_trees import VALUE, automl_paths, save_h5
from parity_tests.helpers.small_models import seeded, tiny
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.cli.commands.source import print_run_config
from porting.errors import CheckpointError, ConversionError
from porting.hparams import RUN_CONFIG, UNSEEN
from porting.infer import Inference, configure
from pytorch_model.config import EfficientDetConfig, model_config

#: A run that differs from D0 in everything that its variables do not show.
CONFIG = tiny(
    image_size=(416, 320),
    anchor_scale=3.0,
    aspect_ratios=((1.0, 1.0), (1.4, 0.7), (0.7, 1.4)),
    act_type="relu6",
    survival_prob=0.8,
    conv_after_downsample=True,
    mean_rgb=(1.0, 2.0, 3.0),
    stddev_rgb=(4.0, 5.0, 6.0),
    fpn_weight_method="attn",
).replace(name="custom")


def run_values(config: EfficientDetConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    """What AutoML's training writes about ``config``."""
    fields = config.to_dict().keys() & DEFAULTS.keys()
    values = {**DEFAULTS, **{name: getattr(config, name) for name in fields}}
    values |= {"name": "efficientdet-d0", "backbone_name": config.backbone.name}
    return {**values, "aspect_ratios": list(config.aspect_ratios), **changes}


def write_run(folder: Path, content: dict[str, Any] | str, config: EfficientDetConfig = CONFIG) -> Path:
    write_bundle(folder / "model.ckpt-7", seeded(config))
    return write_config(folder, content)


def write_config(folder: Path, content: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / RUN_CONFIG).write_text(content if isinstance(content, str) else yaml.dump(content))
    return folder


def read(path: Path, overrides: dict[str, Any] | None = None, model: str | None = None) -> Inference:
    with open_checkpoint(path) as checkpoint:
        return configure(checkpoint, overrides, model, "--model")


# Where it lies


def beside_v2(folder: Path) -> Path:
    return write_run(folder, run_values())


def beside_objects(folder: Path) -> Path:
    paths = automl_paths(CONFIG)
    write_bundle(folder / "ckpt-3", {paths[name] + VALUE: value for name, value in seeded(CONFIG).items()})
    return write_config(folder, run_values())


def beside_h5(folder: Path) -> Path:
    pytest.importorskip("h5py", reason="needs h5py: pip install -e '.[h5]'")
    write_config(folder, run_values())
    save_h5(folder / "model.h5", seeded(CONFIG))
    return folder / "model.h5"


def above_the_best(folder: Path) -> Path:
    """AutoML copies its best checkpoints to ``archive``, without the file."""
    write_config(folder, run_values())
    write_bundle(folder / "archive" / "model.ckpt-7", seeded(CONFIG))
    return folder / "archive"


def in_an_archive(folder: Path) -> Path:
    write_run(folder, run_values())
    with tarfile.open(folder.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(folder, "run")
    shutil.rmtree(folder)
    return folder.with_suffix(".tar.gz")


PLACES = [beside_v2, beside_objects, beside_h5, above_the_best, in_an_archive]


@pytest.mark.parametrize("place", PLACES)
def test_the_run_is_converted_as_it_was_trained(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path / "run")
    with open_checkpoint(path) as checkpoint:
        found = configure(checkpoint)
        assert found.config == CONFIG
        assert found.unseen == ()
        assert {"image_size", "model", *UNSEEN} <= checkpoint.stated_by.keys()
        (witness,) = set(checkpoint.stated_by.values())
    expected = tmp_path / "run" / RUN_CONFIG
    named = f"{path}:run/{RUN_CONFIG}" if place is in_an_archive else str(expected)
    assert witness == named


@pytest.mark.parametrize("width", [40, 200])
def test_commands_without_a_table_say_that_it_was_read(width: int, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "image_size: 416\nact_type: relu6")
    console = Console(record=True, width=width, file=io.StringIO())
    with open_checkpoint(folder) as checkpoint:
        checkpoint.add_settings({"survival_prob": None}, "the release efficientdet-d0")
        print_run_config(console, checkpoint)
    assert console.export_text() == f"read {folder / RUN_CONFIG}: image_size, act_type\n"


def test_what_the_user_gives_wins(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", run_values(num_classes=9))
    found = read(folder, {"image_size": (640, 640), "act_type": "swish", "num_classes": 2})
    assert found.config == CONFIG.replace(image_size=(640, 640), act_type="swish")


def test_what_the_checkpoint_itself_states_wins(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "num_classes: 2\nimage_size: 416")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.add_settings({"image_size": (1, 2), "anchor_scale": 5.0}, "another file")
        assert checkpoint.settings["image_size"] == (416, 416)
        assert checkpoint.stated_by["image_size"] == str(folder / RUN_CONFIG)
        assert checkpoint.stated_by["anchor_scale"] == "another file"


def test_a_tflite_file_knows_its_own_size(tmp_path: Path) -> None:
    from parity_tests.helpers.paths import GOLDENS
    from parity_tests.helpers.tflite_files import TINY

    shutil.copy(GOLDENS / "tiny-lite-float32.tflite", tmp_path / "model.tflite")
    write_config(tmp_path, "image_size: 416\nact_type: relu6")
    with open_checkpoint(tmp_path / "model.tflite") as checkpoint:
        assert configure(checkpoint).config.image_size == TINY.image_size
        said = f"image_size: {tmp_path / RUN_CONFIG} says something else; the checkpoint itself counts"
        assert said in checkpoint.notes


@pytest.mark.parametrize("name", ["label_map", "label_id_mapping"])
def test_its_label_map_names_the_classes(name: str, tmp_path: Path) -> None:
    assert CONFIG.num_classes == 2
    values = {**run_values(), name: {0: "background", 2: "bee"}}
    assert read(write_run(tmp_path, values)).config.class_names == ("", "bee")


def test_its_label_map_may_be_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ants.yaml").write_text("1: ant\n2: bee\n")
    folder = write_run(tmp_path, run_values(label_map="ants.yaml"))
    assert read(folder).config.class_names == ("ant", "bee")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("/data/of/the/trainer.yaml", "there is no file of that name"),
        ({1: "ant", 3: "bee"}, "it names class 3, but the model has classes 1 to 2"),
        (5, "it must be {id: name}"),
    ],
)
def test_a_label_map_that_cannot_be_used_is_noted(value: Any, reason: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_values(label_map=value))
    assert read(folder).config.class_names is None
    with open_checkpoint(folder) as checkpoint:
        assert any(
            f"the label_map in {folder / RUN_CONFIG} is not used: {reason}" in n for n in checkpoint.notes
        )


def test_a_short_file_leaves_the_rest_assumed(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", "image_size: 416x320\nact_type: relu6"))
    assert found.config.image_size == (320, 416)
    assert found.unseen == ("fpn_weight_method", "survival_prob", "conv_after_downsample")
    assert "image size 320×416" not in found.assumed
    assert "anchor scale 4" in found.assumed


def test_the_file_chooses_between_variants_of_the_same_variables(tmp_path: Path) -> None:
    """D6 and D7 have the same variables; shapes suffice to infer."""
    from porting.infer import infer_config
    from tf_reference.variables import variable_shapes

    shapes = variable_shapes(model_config("efficientdet-d7"))
    found = infer_config(shapes, settings={"model": "efficientdet-d7"}, stated_by={"model": "config.yaml"})
    assert found.config == model_config("efficientdet-d7")
    assert not [line for line in found.assumed if "same variables" in line]


def test_json_is_yaml_too(tmp_path: Path) -> None:
    """AutoML's first months wrote a configuration as JSON."""
    import json

    content = json.dumps(run_values(image_size="320x416"))
    assert read(write_run(tmp_path / "run", content)).config == CONFIG


# Files of others


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("model: yolo\nlr: 0.1\nnum_classes: 3", "does not hold AutoML's hyper-parameters"),
        ("", "does not hold AutoML's hyper-parameters"),
        ("[1, 2]", "is not a list of NAME: VALUE lines"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("x" * 70_000, "cannot be read: it has more than"),
    ],
)
def test_a_file_of_another_program_is_left_alone(content: str, note: str, tmp_path: Path) -> None:
    with open_checkpoint(write_run(tmp_path / "run", content)) as checkpoint:
        assert dict(checkpoint.settings) == {}
        (said,) = checkpoint.notes
        assert note in said
        assert str(tmp_path / "run" / RUN_CONFIG) in said
        assert "--hparams" not in said


def test_names_that_automl_does_not_know_are_left_out(tmp_path: Path) -> None:
    values = run_values(mosaic=True, mixup=1, cutmix=2, blur=3)
    with open_checkpoint(write_run(tmp_path / "run", values)) as checkpoint:
        assert configure(checkpoint).config == CONFIG
        (said,) = checkpoint.notes
    assert "also has 'blur', 'cutmix', 'mixup', …, which AutoML does not know; not used" in said


def test_a_name_and_a_suppression_that_automl_does_not_know(tmp_path: Path) -> None:
    values = run_values(name="my-own", nms_configs={"method": "soft", "top": 3})
    with open_checkpoint(write_run(tmp_path / "run", values)) as checkpoint:
        assert configure(checkpoint).config == CONFIG
        (said,) = checkpoint.notes
    assert "names the model 'my-own', which AutoML does not know; not used" in said


@pytest.mark.parametrize("name", ["[efficientdet-d0]", "{a: b}", "3"])
def test_a_name_that_is_no_text(name: str, tmp_path: Path) -> None:
    with open_checkpoint(write_run(tmp_path / "run", f"name: {name}\nnum_classes: 2")) as checkpoint:
        assert "which AutoML does not know" in checkpoint.notes[0]


def test_a_folder_and_a_pipe_of_that_name_are_nothing(tmp_path: Path, pipe: Path) -> None:
    write_run(tmp_path / "run", "").joinpath(RUN_CONFIG).unlink()
    (tmp_path / "run" / RUN_CONFIG).mkdir()
    assert read(tmp_path / "run").config.image_size == (512, 512)
    (tmp_path / "run" / RUN_CONFIG).rmdir()
    pipe.rename(tmp_path / "run" / RUN_CONFIG)
    assert read(tmp_path / "run").config.image_size == (512, 512)


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "").joinpath(RUN_CONFIG).unlink()
    (tmp_path / "run" / RUN_CONFIG).symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(tmp_path / "run", "run")
    assert read(tmp_path / "run.tar").config.image_size == (512, 512)


# Contradictions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_classes": 3},
            "config.yaml says num_classes is 3, but the variables in .*7 say 2; it is",
        ),
        ({"fpn_num_filters": 88}, "says fpn_num_filters is 88, but the variables in .* say 64"),
        (
            {"backbone_name": "efficientnet-b1"},
            "says backbone is efficientnet-b1, but .* efficientnet-b0",
        ),
        ({"fpn_weight_method": "sum"}, "says fpn_weight_method is 'sum', but .* say 'fastattn'"),
        ({"fpn_name": "bifpn_sum", "fpn_weight_method": None}, "says fpn_weight_method is 'sum'"),
        ({"max_level": 6}, "says max_level is 6, but .* say 7"),
        ({"aspect_ratios": [1.0, 2.0]}, "2 aspect_ratios, stated by .*config.yaml, make 6; give --hparams"),
    ],
)
@pytest.mark.parametrize("model", [None, "efficientdet-d0"])
def test_a_file_of_another_model_is_refused(
    changes: dict[str, Any], message: str, model: str | None, tmp_path: Path
) -> None:
    config = model_config("efficientdet-d0", num_classes=2) if model else CONFIG
    values = run_values(config, **changes)
    with pytest.raises(ConversionError, match=message) as caught:
        read(write_run(tmp_path / "run", values, config), model=model)
    assert "--model" not in str(caught.value)  # nobody gave one, or it is right


def test_a_file_that_only_names_another_model_is_refused(tmp_path: Path) -> None:
    config = model_config("efficientdet-d0")
    folder = write_run(tmp_path / "run", "name: efficientdet-d1", config)
    with pytest.raises(
        ConversionError, match=r"says the model is efficientdet-d1, whose \w+ is .*, but the variables in"
    ):
        read(folder)
    with pytest.raises(
        ConversionError,
        match=r"--model says efficientdet-d0, but .*config\.yaml says efficientdet-d1; le",
    ):
        read(folder, model="efficientdet-d0")


def test_the_name_in_hparams_outranks_the_file(tmp_path: Path) -> None:
    config = model_config("efficientdet-d0")
    folder = write_run(tmp_path / "run", "name: efficientdet-d1\nanchor_scale: 2.0", config)
    with open_checkpoint(folder) as checkpoint:
        found = configure(checkpoint, {}, "efficientdet-d0", "the name in --hparams")
    assert found.config == config.replace(anchor_scale=2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "fpn_name: qufpn",
            "config.yaml, which lies with the checkpoint, says fpn_name='qufpn' makes a QuFPN",
        ),
        (
            "separable_conv: false",
            "says separable_conv=False makes a network that this project does not",
        ),
        ("act_type: srelu\nnum_classes: 2", "says act_type is 'srelu', must be one of swish"),
    ],
)
def test_a_network_that_is_not_built_is_refused(content: str, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_advice_names_what_was_given(tmp_path: Path) -> None:
    """The name came from --hparams, so the message must not advise to leave out --model."""
    config = model_config("efficientdet-d0", num_classes=2)
    folder = write_run(tmp_path / "run", "", config)
    by = "the name in --hparams"
    with open_checkpoint(folder) as checkpoint:
        with pytest.raises(ConversionError, match="give --model efficientdet-d0 instead of the name in"):
            configure(checkpoint, {}, "efficientdet-d1", by)
        with pytest.raises(ConversionError, match=r"num_classes was given as 3, but .* say 2; leave it"):
            configure(checkpoint, {"num_classes": 3}, "efficientdet-d0", by)
    other = write_run(tmp_path / "other", "", CONFIG)
    with (
        open_checkpoint(other) as checkpoint,
        pytest.raises(ConversionError, match="; leave out the name in"),
    ):
        configure(checkpoint, {}, "efficientdet-d0", by)
