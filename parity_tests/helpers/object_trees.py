"""The objects of AutoML and of the Object Detection API, written down from their source, with their
variables.

The readers in ``porting.checkpoint`` go from objects to names by structure. This module goes from a
configuration to objects, so that each proves the other. It also writes other files of Keras and of the API.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.helpers.paths import GOLDENS
from porting.checkpoint.base import Checkpoint
from porting.checkpoint.objects.graph import GRAPH_KEY
from pytorch_model.config import EfficientDetConfig
from tf_reference.variables import variables

#: The models whose Keras names are recorded.
LISTED = ["efficientdet-d0", "efficientdet-d4", "efficientdet-lite0"]
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def automl_paths(config: EfficientDetConfig) -> dict[str, str]:
    """AutoML name → path of attributes from the Keras model (``tf2/efficientdet_keras.py``)."""
    scopes = dict(_automl_scopes(config))
    found = {}
    for variable in variables(config):
        scope, _, leaf = variable.name.rpartition("/")
        found[variable.name] = f"{scopes[scope]}/{leaf}"
    return found


def automl_graph(
    config: EfficientDetConfig, names: Mapping[str, str] | None = None, prefix: str = ""
) -> bytes:
    """The object graph of a Keras model. ``names``: path → full name, if it is not AutoML's own name.

    Levels that only pool have an object too, without variables.
    """
    paths = {path: name for name, path in automl_paths(config).items()} | dict(names or {})
    layers = [f"{prefix}resample_layers/{i}/conv2d" for i in range(len(config.extra_levels))]
    return graph_of({prefix + path: name for path, name in paths.items()}, empty=tuple(layers))


def _automl_scopes(config: EfficientDetConfig) -> Iterator[tuple[str, str]]:
    scope = config.backbone.name
    yield f"{scope}/stem/conv2d", "backbone/_stem/_conv_stem"
    yield f"{scope}/stem/tpu_batch_normalization", "backbone/_stem/_bn"
    for i, block in enumerate(config.backbone.blocks):
        convs = ["_expand_conv", "_project_conv"] if block.expand_ratio != 1 else ["_project_conv"]
        bns = ["_bn0", "_bn1", "_bn2"] if block.expand_ratio != 1 else ["_bn1", "_bn2"]
        for n, conv in enumerate(convs):
            yield f"{scope}/blocks_{i}/conv2d" + f"_{n}" * (n > 0), f"backbone/_blocks/{i}/{conv}"
        for n, bn in enumerate(bns):
            yield (
                f"{scope}/blocks_{i}/tpu_batch_normalization" + f"_{n}" * (n > 0),
                f"backbone/_blocks/{i}/{bn}",
            )
        yield f"{scope}/blocks_{i}/depthwise_conv2d", f"backbone/_blocks/{i}/_depthwise_conv"
        yield f"{scope}/blocks_{i}/se/conv2d", f"backbone/_blocks/{i}/_se/_se_reduce"
        yield f"{scope}/blocks_{i}/se/conv2d_1", f"backbone/_blocks/{i}/_se/_se_expand"
    for n, level in enumerate(config.extra_levels):
        for layer in ("conv2d", "bn"):
            yield f"resample_p{level}/{layer}", f"resample_layers/{n}/{layer}"
    for c in range(config.fpn_cell_repeats):
        for n, node in enumerate(config.bifpn_nodes):
            node_scope, path = f"fpn_cells/cell_{c}/fnode{n}", f"fpn_cells/cells/{c}/fnodes/{n}"
            yield node_scope, path
            yield f"{node_scope}/op_after_combine{node.id}/conv", f"{path}/op_after_combine/conv_op"
            yield f"{node_scope}/op_after_combine{node.id}/bn", f"{path}/op_after_combine/bn"
            for i, source in enumerate(node.inputs):
                for layer in ("conv2d", "bn"):
                    resample = f"{node_scope}/resample_{i}_{source}_{node.id}/{layer}"
                    yield resample, f"{path}/resample_layers/{i}/{layer}"
    for kind, predict in (("class", "classes"), ("box", "boxes")):
        yield f"{kind}_net/{kind}-predict", f"{kind}_net/{predict}"
        for i in range(config.box_class_repeats):
            yield f"{kind}_net/{kind}-{i}", f"{kind}_net/conv_ops/{i}"
            for n, level in enumerate(config.levels):
                yield f"{kind}_net/{kind}-{i}-bn-{level}", f"{kind}_net/bns/{i}/{n}"


def odapi_paths(config: EfficientDetConfig, detector_blocks: int) -> dict[str, str]:
    """AutoML name → path from the API's detection model. All WSM variables of a node share one path.

    The detector runs the first ``detector_blocks`` blocks; the others belong to the classifier.
    """
    scopes = dict(_odapi_scopes(config, detector_blocks))
    found = {}
    for variable in variables(config):
        scope, _, leaf = variable.name.rpartition("/")
        found[variable.name] = scopes[scope] if leaf.startswith("WSM") else f"{scopes[scope]}/{leaf}"
    return found


def _odapi_scopes(config: EfficientDetConfig, detector_blocks: int) -> Iterator[tuple[str, str]]:
    extractor, predictor = "_feature_extractor", "_box_predictor"
    for n, (block, scope) in enumerate(_chain(config)):
        model = "_efficientnet" if block < detector_blocks else "classification_backbone"
        yield f"{config.backbone.name}/{scope}", f"{extractor}/{model}/layer_with_weights-{n}"
    stage, extra = f"{extractor}/_bifpn_stage", len(config.extra_levels)
    for n, level in enumerate(config.extra_levels):
        yield f"resample_p{level}/conv2d", f"{stage}/node_input_blocks/{n}/0/1/0"
        yield f"resample_p{level}/bn", f"{stage}/node_input_blocks/{n}/0/1/1"
    for c in range(config.fpn_cell_repeats):
        for n, node in enumerate(config.bifpn_nodes):
            scope, number = f"fpn_cells/cell_{c}/fnode{n}", extra + c * len(config.bifpn_nodes) + n
            yield scope, f"{stage}/node_combine_op/{number}/bifpn_combine_weights"
            yield f"{scope}/op_after_combine{node.id}/conv", f"{stage}/node_post_combine_block/{number}/1"
            yield f"{scope}/op_after_combine{node.id}/bn", f"{stage}/node_post_combine_block/{number}/2"
            for i, source in enumerate(node.inputs):
                for layer, k in (("conv2d", 0), ("bn", 1)):
                    resample = f"{scope}/resample_{i}_{source}_{node.id}/{layer}"
                    yield resample, f"{stage}/node_input_blocks/{number}/{i}/1/{k}"
    for kind, name, predict in (
        ("class", "class_predictions_with_background", "_prediction_heads/{}/_class_predictor_layers/0"),
        ("box", "box_encodings", "_box_prediction_head/_box_encoder_layers/0"),
    ):
        yield f"{kind}_net/{kind}-predict", f"{predictor}/{predict.format(name)}"
        for i in range(config.box_class_repeats):
            tower = f"{predictor}/_head_scope_conv_layers/{kind.capitalize()}PredictionTower/{i}"
            yield f"{kind}_net/{kind}-{i}", tower
            for n, level in enumerate(config.levels):
                bn = f"{predictor}/_base_tower_layers_for_heads/{name}/{n}/{3 * i + 1}"
                yield f"{kind}_net/{kind}-{i}-bn-{level}", bn


def _chain(config: EfficientDetConfig) -> Iterator[tuple[int, str]]:
    """The backbone's layers with weights, in the order they run: (block, or -1; scope)."""
    yield -1, "stem/conv2d"
    yield -1, "stem/tpu_batch_normalization"
    for i, block in enumerate(config.backbone.blocks):
        bn = f"blocks_{i}/tpu_batch_normalization"
        layers = ["depthwise_conv2d", "", "se/conv2d", "se/conv2d_1", "conv2d", "_1"]
        if block.expand_ratio != 1:
            layers = ["conv2d", "", "depthwise_conv2d", "_1", "se/conv2d", "se/conv2d_1", "conv2d_1", "_2"]
        for layer in layers:
            yield i, f"{bn}{layer}" if layer in ("", "_1", "_2") else f"blocks_{i}/{layer}"


# --- the protocol buffer, written by hand ----------------------------------------------------------------


def graph_of(
    paths: Mapping[str, str], keys: Mapping[str, str] | None = None, empty: tuple[str, ...] = ()
) -> bytes:
    """A ``TrackableObjectGraph``: path → the variable's full name. ``keys``: path → key, if it differs.

    ``empty`` are paths of objects without variables.
    """
    nodes: list[tuple[dict[str, int], bytes]] = [({}, b"")]
    for path in (*paths, *empty):
        at = 0
        for part in path.split("/"):
            if part not in nodes[at][0]:
                nodes[at][0][part] = len(nodes)
                nodes.append(({}, b""))
            at = nodes[at][0][part]
        if path in paths:
            key = (keys or {}).get(path, path) + VALUE
            tensor = _bytes(1, b"VARIABLE_VALUE") + _bytes(2, paths[path].encode()) + _bytes(3, key.encode())
            nodes[at] = (nodes[at][0], _bytes(2, tensor))
    return b"".join(_bytes(1, _node(children, attribute)) for children, attribute in nodes)


def _node(children: Mapping[str, int], attribute: bytes) -> bytes:
    references = (_varint(8) + _varint(child) + _bytes(2, name.encode()) for name, child in children.items())
    return b"".join(_bytes(1, reference) for reference in references) + attribute


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


class Memory(Checkpoint):
    """Arrays in place of a TensorBundle, with an object graph if one is given."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], graph: bytes | None = None, source: str = "folder/ckpt-1"
    ) -> None:
        self._arrays: dict[str, Any] = dict(arrays)
        self._graph = graph
        shapes = {name: array.shape for name, array in arrays.items()}
        dtypes = {name: array.dtype for name, array in arrays.items()}
        if graph is not None:
            shapes[GRAPH_KEY], dtypes[GRAPH_KEY] = (), np.dtype(object)
        super().__init__(source, "memory", shapes, dtypes)

    def _read(self, name: str) -> np.ndarray:
        return np.array(self._arrays[name])

    def read_string(self, name: str) -> bytes:
        assert name == GRAPH_KEY
        assert self._graph is not None
        return self._graph


# --- other files of Keras and of the Detection API ------------------------------------------


@cache
def keras_names() -> dict[str, dict[str, list[int]]]:
    loaded: dict[str, dict[str, list[int]]] = json.loads(
        lzma.decompress((GOLDENS / "keras_names.json.xz").read_bytes())
    )
    return loaded


def save_h5(path: Path, values: Mapping[str, np.ndarray], piece: int = 10**6) -> None:
    """Write ``values`` as Keras 2 does. Lists of names are split into pieces of ``piece`` names."""
    import h5py

    layers: dict[str, list[str]] = {"resample_p7": []}
    for name in values:
        layers.setdefault(name.split("/")[0], []).append(f"{name}:0")
    with h5py.File(path, "w") as file:
        _save_names(file.attrs, "layer_names", list(layers), piece)
        for layer, names in layers.items():
            group = file.create_group(layer)
            _save_names(group.attrs, "weight_names", names, piece)
            for name in names:
                group.create_dataset(name, data=values[name.removesuffix(":0")])
        _save_names(file.create_group("top_level_model_weights").attrs, "weight_names", [], piece)


def _save_names(attributes: Any, name: str, names: list[str], piece: int) -> None:
    encoded = [item.encode() for item in names]
    if len(encoded) <= piece:
        attributes[name] = encoded
    else:
        for number, start in enumerate(range(0, len(encoded), piece)):
            attributes[f"{name}{number}"] = encoded[start : start + piece]


# As in the API's template for D0. Its box coder differs from that of the API's released models.
PIPELINE = """
# SSD with EfficientNet-b0 + BiFPN
model {{
  ssd {{
    num_classes: {num_classes}
    add_background_class: {background}
    box_coder {{ faster_rcnn_box_coder {{ {box_coder} }} }}
    anchor_generator: {{
      multiscale_anchor_generator {{
        min_level: 3, max_level: {anchor_level}; anchor_scale: {anchor_scale}
        aspect_ratios: {ratios} scales_per_octave: {scales}
      }}
    }}
    image_resizer {{ {resizer} }}
    box_predictor {{
      weight_shared_convolutional_box_predictor {{
        conv_hyperparams < force_use_bias: true activation: SWISH batch_norm {{ epsilon: 0.001 }} >
      }}
    }}
    feature_extractor {{
      type: '{extractor}' {padding}
      bifpn {{ min_level: 3 max_level: {bifpn_level} num_iterations: 3 num_filters: 64 {combine} }}
      conv_hyperparams {{ activation: {activation} batch_norm {{ epsilon: {epsilon} }} }}
    }}
    post_processing {{ score_converter: {converter} }}
  }}
}}
train_config: {{ batch_size: 128 }}
"""
DEFAULTS = {
    "num_classes": 2,
    "background": "false",
    "box_coder": "y_scale: 1.0 x_scale: 1.0 height_scale: 1.0 width_scale: 1.0",
    "anchor_level": 7,
    "anchor_scale": 4.0,
    "bifpn_level": 7,
    "ratios": "[1.0, 2.0, 0.5]",
    "scales": 3,
    "padding": "",
    "extractor": "ssd_efficientnet-b0_bifpn_keras",
    "combine": "",
    "activation": "SWISH",
    "epsilon": 0.001,
    "converter": "SIGMOID",
}


def pipeline_text(size: int = 512, **changes: Any) -> str:
    resizer = f"min_dimension: {size} max_dimension: {size} pad_to_max_dimension: true"
    usual = {**DEFAULTS, "resizer": f"keep_aspect_ratio_resizer {{ {resizer} }}"}
    return PIPELINE.format(**{**usual, **changes})
