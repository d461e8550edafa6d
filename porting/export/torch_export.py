"""``torch.export`` programs (``.pt2``): the network with a free batch, at the configuration's image size."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from porting.errors import OutputError
from porting.export import Weights, Written
from porting.export.network import compare_outputs, example_images, loaded, quiet
from pytorch_model.files import check_writable, replacing


def write(weights: Weights, out: Path) -> Written:
    """Write ``out``, a file whose name ends in ``.pt2``, load it again and compare."""
    if out.suffix != ".pt2":
        raise OutputError(f"cannot write {out}: use a name that ends in .pt2")
    check_writable(out)
    network = loaded(weights)
    batch = torch.export.Dim("batch", min=1)
    with replacing(out) as temporary, quiet():
        program = torch.export.export(
            network, (example_images(weights.config),), dynamic_shapes=({0: batch},), strict=False
        )
        buffer = io.BytesIO()  # torch's own writer hides errors of the disk
        torch.export.save(program, buffer)
        temporary.write_bytes(buffer.getbuffer())
        again = torch.export.load(temporary).module()

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                class_outputs, box_outputs = again(images)
            return class_outputs + box_outputs

        worst = compare_outputs(network, run)
    height, width = weights.config.input_size
    return Written(
        (out,),
        (
            f"images float32 [batch, 3, {height}, {width}], normalised; any batch",
            f"loaded again, 1 and 3 images: outputs within relative L2 {worst:.1e} of the network's",
        ),
    )
