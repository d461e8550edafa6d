"""AutoML's hyper-parameters: the meaning of every name, and one sentence for every error."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.configs import AUTOML_DEFAULTS as DEFAULTS
from parity_tests.helpers.paths import ROOT
from porting.errors import ConfigError
from porting.hparams import Hparams, given_names, read_hparams
from porting.hparams.meaning import FIELDS, FIXED, IGNORED, NMS_FIELDS
from porting.infer import infer_config, named_config
from pytorch_model.config import ACTIVATIONS, MODELS, WEIGHT_METHODS, EfficientDetConfig, model_config
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.labels.known import COCO_NAMES, LABEL_MAPS
from tf_reference.variables import variable_shapes

#: Names that set several things, or nothing alone.
SPECIAL = {"fpn_name", "name", "scale_range"}


def written(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Meaning


def test_the_yaml_of_a_training_run_is_the_model(tmp_path: Path) -> None:
    """``yaml.dump``, as AutoML calls it, writes image_size as a Python tuple."""
    text = yaml.dump(DEFAULTS, default_flow_style=False)
    assert "!!python/tuple" in text
    read = read_hparams(written(tmp_path, text))
    assert read.model == "efficientdet-d1"
    assert NMSConfig(**read.nms) == NMSConfig(max_nms_inputs=0)
    plain = model_config("efficientdet-d1")
    found = infer_config(variable_shapes(plain), overrides=read.overrides)
    assert found.config.replace(mean_rgb=plain.mean_rgb, stddev_rgb=plain.stddev_rgb) == plain
    assert found.config.mean_rgb == pytest.approx(plain.mean_rgb)
    assert found.config.stddev_rgb == pytest.approx(plain.stddev_rgb)
    assert found.assumed == ()  # all of it was given
    assert set(read.ignored) == {
        name for name in DEFAULTS if name not in {*FIELDS, *FIXED, *SPECIAL, "nms_configs"}
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_default_alone_is_accepted(name: str, tmp_path: Path) -> None:
    value = DEFAULTS[name]
    from_yaml = read_hparams(written(tmp_path, yaml.dump({name: value})))
    if not isinstance(value, tuple):
        text = (
            {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
        )
        assert read_hparams(f"{name}={text}") == from_yaml


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", {}),
        (" , ,", {}),
        ("num_classes=20", {"num_classes": 20}),
        (" num_classes = 20 , ", {"num_classes": 20}),
        ("image_size=640x480", {"image_size": (480, 640)}),  # width first, as AutoML writes it
        ("image_size='640x480'", {"image_size": (480, 640)}),
        ("image_size=640X480", {"image_size": (480, 640)}),  # AutoML lowers it
        ("image_size=896", {"image_size": (896, 896)}),
        ("image_size=(480,640)", {"image_size": (480, 640)}),  # a tuple is height first
        ("aspect_ratios=[1.0,2.0,0.5],num_scales=2", {"aspect_ratios": (1.0, 2.0, 0.5), "num_scales": 2}),
        ("aspect_ratios=1.0*2.0*0.5", {"aspect_ratios": (1.0, 2.0, 0.5)}),
        ("aspect_ratios=(1,2)", {"aspect_ratios": (1.0, 2.0)}),
        ("conv_bn_act_pattern=true", {"conv_bn_act_pattern": True}),
        ("conv_bn_act_pattern=True", {"conv_bn_act_pattern": True}),
        ("conv_after_downsample=true", {"conv_after_downsample": True}),
        ("survival_prob=0.8", {"survival_prob": 0.8}),
        ("survival_prob=1", {"survival_prob": 1.0}),
        ("survival_prob=None", {"survival_prob": None}),
        ("survival_prob=0.0", {"survival_prob": None}),  # AutoML asks whether it is set
        ("act_type=relu6", {"act_type": "relu6"}),
        ("act_type='mish'", {"act_type": "mish"}),
        ("fpn_weight_method=sum", {"fpn_weight_method": "sum"}),
        ("fpn_weight_method=None", {"fpn_weight_method": "fastattn"}),
        ("mean_rgb=127.0,stddev_rgb=128", {"mean_rgb": (127.0,) * 3, "stddev_rgb": (128.0,) * 3}),
        ("mean_rgb=[1,2,3]", {"mean_rgb": (1.0, 2.0, 3.0)}),
        ("stddev_rgb=1*2*3", {"stddev_rgb": (1.0, 2.0, 3.0)}),
        (
            "mean_rgb=0.0,stddev_rgb=1.0,scale_range=True",
            {"mean_rgb": (127.5,) * 3, "stddev_rgb": (127.5,) * 3},
        ),
        ("scale_range=false", {}),
        ("backbone_name=efficientnet-b3", {"backbone": model_config("efficientdet-d3").backbone}),
        ("min_level=3,max_level=8", {"min_level": 3, "max_level": 8}),
        ("anchor_scale=5", {"anchor_scale": 5.0}),
        ("anchor_scale=[4,4,4,4,5.5]", {"anchor_scale": (4.0, 4.0, 4.0, 4.0, 5.5)}),
        (
            "aspect_ratios=[(1.0,1.0),(1.4,0.7),(0.7,1.4)]",
            {"aspect_ratios": ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))},
        ),
        ("aspect_ratios=[1.0,[1.4,0.7]]", {"aspect_ratios": (1.0, (1.4, 0.7))}),
        ("separable_conv=true,fpn_name=None,heads=['object_detection']", {}),
        ("fpn_name=bifpn,backbone_config=None,model_optimizations={}", {}),
        ("fpn_name=bifpn_dyn", {}),
        ("fpn_name=bifpn_dyn,fpn_weight_method=attn", {"fpn_weight_method": "attn"}),
        ("fpn_name=bifpn_fa", {"fpn_weight_method": "fastattn"}),
        ("fpn_name=bifpn_sum", {"fpn_weight_method": "sum"}),
        ("fpn_name=bifpn_sum,fpn_weight_method=None", {"fpn_weight_method": "sum"}),  # AutoML's D6 of 2020-05
        ("fpn_weight_method=sum,fpn_name=bifpn_sum", {"fpn_weight_method": "sum"}),
        ("use_native_resize_op=true,pooling_type=max", {}),
        ("heads=['object_detection','segmentation']", {}),
        ("heads=segmentation*object_detection", {}),
        ("learning_rate=0.1,var_freeze_expr=(efficientnet|fpn_cells),label_map={1:'a,b',2:'c'}", {}),
    ],
)
def test_the_meaning_of_text(text: str, overrides: dict[str, Any]) -> None:
    read = read_hparams(text)
    assert read.overrides == overrides
    for name, value in overrides.items():
        assert type(read.overrides[name]) is type(value)
    model_config("efficientdet-d0", **{k: v for k, v in overrides.items() if k != "min_level"})


def test_nms_ignored_and_model() -> None:
    read = read_hparams(
        "name=efficientdet-lite3x,nms_configs.method=hard,nms_configs.score_thresh=None,learning_rate=1,"
        "device.grad_ckpting=true,nms_configs.iou_thresh=0.6,nms_configs.max_output_size=5"
    )
    nms = {"method": "hard", "score_thresh": 0.0, "iou_thresh": 0.6, "max_output_size": 5}
    assert read == Hparams("efficientdet-lite3x", {}, nms, ("learning_rate", "device.grad_ckpting"))
    assert read_hparams("nms_configs={'method':'hard','sigma':None}").nms == {"method": "hard", "sigma": None}
    assert NMSConfig(**read.nms).method == "hard"


def test_every_field_of_a_configuration_can_be_given() -> None:
    fields = {field.name for field in dataclasses.fields(EfficientDetConfig)} - {"name"}
    assert {field for field, _ in FIELDS.values()} == fields - {"class_names", "resizer", "anchor_stride"}
    assert {name.removeprefix("nms_configs.") for name in NMS_FIELDS} == {
        field.name for field in dataclasses.fields(NMSConfig)
    } - {"scope"}  # AutoML has two functions there, no hyper-parameter
    assert not set(FIELDS) & IGNORED
    assert not set(FIXED) & (IGNORED | set(FIELDS))


def test_overrides_reach_the_configuration() -> None:
    shapes = variable_shapes(model_config("efficientdet-d0", num_classes=7))
    read = read_hparams("num_classes=7,image_size=640x512,survival_prob=0.8,act_type=relu")
    for inference in (
        infer_config(shapes, overrides=read.overrides),
        named_config("efficientdet-d0", shapes, read.overrides),
    ):
        config = inference.config
        assert (config.num_classes, config.image_size) == (7, (512, 640))
        assert (config.survival_prob, config.act_type) == (0.8, "relu")


# Class names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label_map={1:'ant',2:'bee'}", {1: "ant", 2: "bee"}),
        ("label_map={1: ant, 2: bee},num_classes=2", {1: "ant", 2: "bee"}),
        ("label_map={0:'background',2:'bee'}", {0: "background", 2: "bee"}),
        ("label_id_mapping={1:'ant'}", {1: "ant"}),
        ("label_map=None,label_id_mapping={1:'ant'}", {1: "ant"}),
        ("label_map.1=ant,label_map.2=bee", {1: "ant", 2: "bee"}),
        ("label_map={1:7}", {1: "7"}),
        ("label_map=waymo", {1: "vehicle", 2: "pedestrian", 3: "cyclist"}),
        ("label_map=None", None),
        ("label_map={}", None),
        ("num_classes=3", None),
    ],
)
def test_label_maps_in_text(text: str, expected: dict[int, str] | None) -> None:
    assert read_hparams(text).label_map == expected


def test_label_maps_of_known_data_sets() -> None:
    assert read_hparams("label_map=coco").label_map == LABEL_MAPS["coco"]
    assert read_hparams("label_map=voc").label_map == LABEL_MAPS["voc"]


def test_ids_of_a_label_map_are_class_ids() -> None:
    """Also those of COCO's 80 names without gaps: who trained with them has these classes."""
    names = [name for name in COCO_NAMES if name]
    text = ",".join(f"{index}: {name}" for index, name in enumerate(names, start=1))
    hparams = read_hparams(f"label_map={{{text}}}")
    assert given_names(hparams, 90) == (*names, *[""] * 10)


@pytest.mark.parametrize(
    "text",
    [
        "num_classes: 3\nlabel_map: {1: ant, 2: bee}\n",
        "label_map:\n  1: ant\n  2: bee\nlearning_rate: 0.1\n",
        "label_id_mapping:\n  '1': ant\n  '2': bee\n",
        "label_map: ids.yaml\n",
        "label_map: ./ids.yaml\n",
    ],
)
def test_label_maps_in_yaml(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is looked for in the current folder, as AutoML does, and beside the hparams."""
    (tmp_path / "ids.yaml").write_text("1: ant\n2: bee\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    read = read_hparams(written(tmp_path, text))
    assert read.label_map == {1: "ant", 2: "bee"}
    assert given_names(read, 3) == ("ant", "bee", "")
    monkeypatch.chdir(tmp_path)
    assert read_hparams("label_map=./ids.yaml,num_classes=3").label_map == {1: "ant", 2: "bee"}
    assert given_names(read_hparams("num_classes=3"), 3) is None


def test_googles_form_of_a_label_map(tmp_path: Path) -> None:
    lines = ["0: background", *(f"{index}: {name}" for index, name in LABEL_MAPS["coco"].items())]
    (tmp_path / "ids.yaml").write_text("\n".join(lines))
    read = read_hparams(f"label_map={tmp_path / 'ids.yaml'}")
    assert given_names(read, 90) == COCO_NAMES


@pytest.mark.parametrize("value", ["there/ids.yaml", "imagenet"])
def test_a_label_map_that_is_not_here(value: str, tmp_path: Path) -> None:
    """The YAML of a training run may name a file of another machine; a user's own text may not."""
    read = read_hparams(written(tmp_path, f"label_map: {value}\nmomentum: 0.9"))
    assert read.label_map is None
    there_is_none = "there is no file of that name, and it is none of coco, voc, waymo"
    assert read.ignored == (f"label_map ({value!r}: {there_is_none})", "momentum")
    with pytest.raises(ConfigError, match=f"label_map is '{value}': {there_is_none}; correct it or leave it"):
        read_hparams(f"label_map={value}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{'ant':1}", "'ant' is not a class id"),
        ("{1:None}", "the name of class 1 is None, not one line of text"),
        ("{0:'ant',1:'bee'}", r"it names class 0 \('ant'\), but AutoML's classes count from 1"),
        ("{1: ant, 1: bee}", "it has the key '1' twice"),
        ("5", "it must be {id: name}, coco, voc, waymo, or a .yaml file"),
        ("bad.yaml", "bad.yaml is not a label map: 'num_classes' is not a class id"),
        (".", "cannot be read"),
    ],
)
def test_label_maps_that_mean_nothing(
    value: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("num_classes: 3\n")
    with pytest.raises(ConfigError, match=rf"label_map is .*: .*{reason}.*; correct it or leave it out"):
        read_hparams(f"label_map={value}")


def test_both_ways_to_give_a_label_map_are_too_many() -> None:
    with pytest.raises(ConfigError, match=r"'label_map\.2' is not a hyper-parameter"):
        read_hparams("label_map={1:'ant'},label_map.2=bee")


def test_a_label_map_of_another_model() -> None:
    with pytest.raises(ConfigError, match="label_map of --hparams does not fit this model: it names class 2"):
        given_names(read_hparams("label_map={2:'bee'}"), 1)


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_class=3", "'num_class' is not a hyper-parameter .* did you mean num_classes"),
        ("aspect_ratio=[1]", "did you mean aspect_ratios"),
        ("nms_config.method=hard", r"did you mean nms_configs\.method"),
        ("nms_configs.iou_threshold=1", r"did you mean nms_configs\.iou_thresh"),
        ("xyzzy=1", "'xyzzy' is not a hyper-parameter"),
        ("learning_rate.x=1", "did you mean learning_rate"),
        ("image_size.x=1", "did you mean image_size"),
        ("separable_conv=false", "separable_conv=False makes a network .* only separable_conv=True"),
        ("separable_conv=1", "separable_conv=1 makes"),
        ("apply_bn_for_resampling=false", "apply_bn_for_resampling=False makes"),
        ("fpn_name=qufpn", "fpn_name='qufpn' makes a QuFPN, a network .* only bifpn, bifpn_dyn"),
        ("fpn_name=qufpn_fa", "fpn_name='qufpn_fa' makes a QuFPN"),
        ("fpn_name=[1]", r"fpn_name=\[1\] makes a network"),
        (
            "fpn_name=bifpn_sum,fpn_weight_method=attn",
            "fpn_name=bifpn_sum and fpn_weight_method='attn' contra",
        ),
        ("fpn_config={'nodes':[]}", "fpn_config=.* makes"),
        ("backbone_config={}", "backbone_config={} makes"),
        ("backbone_config.blocks=[1]", r"backbone_config\.blocks=\[1\] makes .*; leave it out"),
        ("heads=['segmentation']", "heads=.* makes"),
        ("heads=segmentation", "heads=.* makes"),
        ("pooling_type=avg", "pooling_type='avg' makes"),
        ("model_optimizations={'prune':{}}", "model_optimizations=.* makes"),
        ("act_type=srelu", "act_type is 'srelu', must be one of swish,"),
        ("act_type=identity", "must be one of"),
        ("fpn_weight_method=fast", "must be one of fastattn"),
        ("backbone_name=resnet50", "must be one of efficientnet-b0"),
        ("backbone_name=None", "backbone_name is None, must be one of efficientnet-b0"),
        ("name=retinanet-50", "name is 'retinanet-50', must be one of efficientdet-d0"),
        ("num_classes=true", "num_classes is True, must be a whole number"),
        ("num_classes=20.0", "num_classes is 20.0, must be a whole number"),
        ("num_classes=0", "num_classes is 0, must be a whole number from 1"),
        ("num_classes=-3", "num_classes is -3"),
        ("num_classes=1e999", "num_classes is inf"),
        ("num_classes=20;image_size=640", "num_classes is '20;image_size=640'"),
        ("num_classes=0x" + "f" * 5000, "num_classes is a number too long to show"),
        ("num_classes=" + "9" * 5000, r"num_classes is '9+…', must be"),
        ("num_classes=None", "num_classes is None"),
        ("max_level=1000", "max_level is 1000"),
        ("image_size=640x", "image_size is '640x', must be .* or two as WIDTHxHEIGHT"),
        ("image_size=640x480x3", "image_size is"),
        ("image_size=640x0", "image_size is"),
        ("image_size=640.5", "image_size is 640.5"),
        ("image_size=[640,480]", "image_size is"),  # AutoML rejects it too: it is ambiguous
        ("image_size=640x-480", "image_size is"),
        ("image_size=(1,2,3)", "image_size is"),
        ("image_size=true", "image_size is True"),
        ("aspect_ratios=[]", "aspect_ratios is"),
        ("aspect_ratios=2.0", "aspect_ratios is 2.0, must be a list"),
        ("aspect_ratios=[1,0]", "aspect_ratios is"),
        ("aspect_ratios=[(1.0,1.0),(1.4,)]", "must be a list of numbers above 0 .each width by height"),
        ("aspect_ratios=[(1.0,1.0),(1.4,0)]", "or of pairs"),
        ("aspect_ratios=[(1.0,1.0),(1.4,1.0,1.0)]", "or of pairs"),
        ("aspect_ratios=[1,nan]", "aspect_ratios is"),
        ("anchor_scale=0", "anchor_scale is 0"),
        ("anchor_scale=[]", "anchor_scale is"),
        ("anchor_scale=[4,4,0]", "anchor_scale is"),
        ("survival_prob=1.5", "survival_prob is 1.5, must be a number from 0 to 1"),
        ("survival_prob=true", "survival_prob is True"),
        ("mean_rgb=[1,2]", "mean_rgb is .* must be a number, or a list of three"),
        ("mean_rgb=[1,2,'3']", "mean_rgb is"),
        ("mean_rgb=1e999", "mean_rgb is inf"),
        ("stddev_rgb=0", "stddev_rgb is 0, must be a number above 0"),
        ("stddev_rgb=1*0*1", "stddev_rgb is"),
        ("scale_range=true", "scale_range=true needs mean_rgb=0.0,stddev_rgb=1.0"),
        ("scale_range=true,mean_rgb=0.0", "scale_range=true needs"),
        ("scale_range=maybe", "scale_range is 'maybe', must be true or false"),
        ("conv_bn_act_pattern=yes", "conv_bn_act_pattern is 'yes', must be true or false"),
        ("nms_configs=hard", r"nms_configs is not a mapping; write nms_configs\.method=hard"),
        ("nms_configs.method=soft", r"nms_configs\.method is 'soft', must be one of gaussian, hard"),
        ("nms_configs.method=linear", r"nms_configs\.method is 'linear', must be one of gaussian, hard"),
        ("nms_configs.iou_thresh=2", r"nms_configs\.iou_thresh is 2"),
        ("nms_configs.pyfunc=1", r"nms_configs\.pyfunc is 1"),
        ("num_classes", "has 'num_classes' where NAME=VALUE belongs"),
        ("=3", "has '=3' where NAME=VALUE belongs"),
        ("num_classes=1,num_classes=2", "gives 'num_classes' twice"),
        ("aspect_ratios=[1,2", "a bracket or quote without its other half"),
        ("aspect_ratios=1,2]", "a bracket or quote without its other half"),
        ("act_type='swish", "a bracket or quote without its other half"),
        ("a" * 5000 + "=1", "'a+…' is not"),
        ("absent.yaml", r"--hparams absent\.yaml cannot be read: No such file"),
        ("absent.YML", "cannot be read"),
    ],
)
def test_text_that_is_rejected(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_hparams(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "is not a list of NAME: VALUE lines"),
        ("just words", "is not a list of NAME: VALUE lines"),
        ("1: 2", "is not a list of NAME: VALUE lines"),
        ("num_classes: [", "is not YAML: line 1: "),
        ("a: b\n  c: d\n", "is not YAML: line 2: mapping values"),
        ("num_classes: twenty", "num_classes is 'twenty'"),
        ("num_classes: 20\nnum_clases: 3", "did you mean num_classes"),
        ("x: !!python/object/apply:os.system ['true']", "is not YAML: line 1: could not determine"),
        ("x: !!python/name:os.system", "is not YAML"),
        ("!!python/object:subprocess.Popen {num_classes: 3}", "is not YAML: line 1: could not determine"),
        ("!!python/object/new:hparams_config.Config {num_classes: 3}", "is not YAML: line 1: could not"),
        ("learning_rate: 2020-99-99", "holds a value that means nothing|is not YAML"),
        ("? [1]\n: 2", "is not YAML: line 1: "),
        ("num_classes: &a [*a]", r"line 1 refers to another value \(\*a\)"),
        ("nms_configs: &a {method: *a}", r"line 1 refers to another value \(\*a\)"),
        ("image_size: [640, 480]", "image_size is"),
        ("image_size: 640x480x", "image_size is"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"\x00", "is not YAML"),
        ("[" * 5000, "means nothing|is not YAML"),
        ("x: " + "a" * (64 << 10), r"cannot be read: it has more than 65,536 bytes; check the path$"),
        ("[" + "1," * 10_000 + "1]", "holds more than 10,000 values; is it the right file"),
    ],
)
def test_yaml_that_is_rejected(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_hparams(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_the_class_of_automl_is_read_as_a_mapping(tmp_path: Path) -> None:
    """No object is made. Another class is rejected, see above."""
    text = "!!python/object:hparams_config.Config\nnum_classes: 3\n"
    text += "nms_configs: !!python/object:x.Config\n  method: hard"
    read = read_hparams(written(tmp_path, text))
    assert (read.overrides, read.nms) == ({"num_classes": 3}, {"method": "hard"})


def test_yaml_that_is_accepted(tmp_path: Path) -> None:
    assert read_hparams(written(tmp_path, "")) == Hparams(None, {}, {}, ())
    read = read_hparams(
        written(tmp_path, "image_size: 640x480\nnms_configs:\n  method: hard\nweight_decay: 4e-5")
    )
    assert read.overrides == {"image_size": (480, 640)}
    assert (read.nms, read.ignored) == ({"method": "hard"}, ("weight_decay",))


def test_a_yaml_file_in_a_folder_with_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert read_hparams(written(folder, "num_classes: 3")).overrides == {"num_classes": 3}


def test_a_folder_called_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hparams(str(tmp_path / "x.yaml"))


def test_yaml_is_a_file(pipe: Path) -> None:
    named = pipe.rename(pipe.with_suffix(".yaml"))
    with pytest.raises(ConfigError, match="cannot be read: it is a pipe or a device, not a file"):
        read_hparams(str(named))


@pytest.mark.parametrize("levels", ["<<: [*a{0}, *a{0}]", "? !!python/tuple [*a{0}, *a{0}]\n    : 1"])
def test_short_yaml_with_many_values(levels: str, tmp_path: Path) -> None:
    """Each level doubles the one before it: 2**40 values in two kilobytes."""
    lines = ["label_map:", "  a0: &a0 !!python/tuple [1]" if "tuple" in levels else "  a0: &a0 {k: v}"]
    for level in range(1, 40):
        lines.append(f"  a{level}: &a{level}\n    {levels.format(level - 1)}")
    with pytest.raises(ConfigError, match=r"line 4 refers to another value \(\*a0\); write it out"):
        read_hparams(written(tmp_path, "\n".join(lines)))


def test_yaml_is_imported_only_for_yaml() -> None:
    code = "import sys, porting.hparams as h; h.read_hparams('num_classes=3'); print('yaml' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# Any input gives a result or a ConfigError

ANY_NAME = [*FIELDS, *NMS_FIELDS, *FIXED, *sorted(IGNORED), *sorted(SPECIAL), "device.x", "bogus"]
VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["true", "None", "[1,2]", "640x480", "1*2*3", "{}", "()", "'", "[[[", "1e999", "nan", "1j", "b''"]
    ),
    st.sampled_from([*MODELS, *ACTIVATIONS, *WEIGHT_METHODS, "hard", "gaussian"]),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.floats(0.1, 10), max_size=4).map(str),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2).map(repr),
)
PAIRS = st.lists(st.tuples(st.sampled_from(ANY_NAME) | st.text(max_size=8), VALUES), max_size=6)


def read_or_reject(text: str) -> None:
    try:
        read = read_hparams(text)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
        with suppress(ConfigError):  # sound values may be no EfficientDet together: min_level above max_level
            model_config("efficientdet-d0", **read.overrides)
        NMSConfig(**read.nms)
        hash(tuple(read.overrides.items()))  # fit for a frozen configuration
    assert "\n" not in message


@given(st.text())
@example("x=" + "(" * 3000)
@example("x=" + "(" * 300 + ")" * 300)
@example("x=1if 1else 0")
@example("x='\\N{'")
@example("x=\x00")
@example("num_classes={[1]:2}")
@example("num_classes=" + "-" * 20_000 + "1")
@example("num_classes=" + "1+" * 20_000 + "1")
@example("\ud800=\ud800")
@settings(deadline=None)
def test_any_text(text: str) -> None:
    read_or_reject(text)


def test_python_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Python warns about ``'\\d'`` and ``1if``, but the user did not write Python."""
    assert read_hparams(r"var_freeze_expr='\d+',save_freq=1if 1else 0").ignored
    assert not recwarn


@given(PAIRS)
@settings(deadline=None, max_examples=300)
def test_any_pairs(pairs: list[tuple[str, str]]) -> None:
    read_or_reject(",".join(f"{name}={value}" for name, value in pairs))


YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=10)
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ANY_NAME), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(ANY_NAME), YAML_VALUES, max_size=6))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_yaml_values(tmp_path: Path, values: dict[str, Any]) -> None:
    read_or_reject(written(tmp_path, yaml.safe_dump(values)))


@given(st.text(st.characters(codec="utf-8")) | st.text("[]{}:-,&*!#|>?%@`'\" \n\t0123456789_.eExX~ab"))
@example("a: 0x_")
@example("a: 0b")
@example("a: 1:60:99")
@example("a: 2001-1-1T99:99:99")
@example("a: !!timestamp x")
@example("a: !!int x")
@example("a: !!float ''")
@example("a: !!binary é")
@example("a: !!python/tuple 3")
@example("a: !!python/object:Config 3")
@example("!!python/object:x.Config [1]")
@example("!!python/object:Config {? {a: b} : c}")
@example("a: &a !!python/tuple [*a]")
@example("<<: 3")
@example("<<: *x")
@example("? {a: b}\n: c")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_yaml_text(tmp_path: Path, text: str) -> None:
    read_or_reject(written(tmp_path, text))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_classes": st.integers(1, 1000),
            "fpn_num_filters": st.integers(1, 1000),
            "anchor_scale": st.floats(0.1, 10),
            "survival_prob": st.none() | st.floats(0.1, 1),
            "act_type": st.sampled_from(ACTIVATIONS),
            "fpn_weight_method": st.sampled_from(WEIGHT_METHODS),
            "conv_after_downsample": st.booleans(),
            "aspect_ratios": st.lists(st.floats(0.1, 10), min_size=1, max_size=5).map(tuple),
            "mean_rgb": st.tuples(*[st.floats(-10, 300)] * 3),
            "image_size": st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
        },
    ),
    st.sampled_from(["python", "star", "yaml"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_values_are_read_again(tmp_path: Path, values: dict[str, Any], style: str) -> None:
    def text(name: str, value: Any) -> str:
        if name == "image_size":
            return f"{value[1]}x{value[0]}"
        if isinstance(value, tuple) and style == "star" and len(value) > 1:
            return "*".join(map(str, value))
        return str(list(value) if isinstance(value, tuple) else value)

    if style == "yaml":
        read = read_hparams(written(tmp_path, yaml.dump(values)))
    else:
        read = read_hparams(",".join(f"{name}={text(name, value)}" for name, value in values.items()))
    assert read.overrides == values
