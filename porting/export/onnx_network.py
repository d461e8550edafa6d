"""ONNX: the network without postprocessing, images → class and box outputs of every level."""

from __future__ import annotations

from pathlib import Path

from porting.export import Weights, Written
from porting.export.network import compare_outputs, head_names, loaded
from porting.export.onnx_file import check_onnx, network_graph, run_onnx, save_onnx
from pytorch_model.files import replacing


def write(weights: Weights, out: Path) -> Written:
    """Write ``out`` (``.onnx``) and compare its outputs with PyTorch's, for 1 and 3 images."""
    check_onnx(out)
    network, names = loaded(weights), head_names(weights.config)
    with replacing(out) as temporary:
        save_onnx(network_graph(weights), temporary, weights)
        worst = compare_outputs(network, lambda images: run_onnx(temporary, {"images": images}))
    height, width = weights.config.input_size
    return Written(
        (out,),
        (
            f"images float32 [batch, 3, {height}, {width}], normalised → {names[0]}…{names[-1]}",
            f"run by ONNX Runtime, 1 and 3 images: outputs within relative L2 {worst:.1e} of PyTorch's",
        ),
    )
