"""Thin the graphs that Google's code saved, so that they are small enough for the project.

    python parity_tests/goldens/make_graphs.py FOLDER/d0/model.meta FOLDER/lite0/model.meta …

The graphs were built by AutoML's EfficientDet code, from the package tflite-model-maker 0.4.3
(``inference.build_model``, evaluation mode, images of 128×128; D0 by the legacy builder, Lite0 by the Keras
one, ``d0_train`` in training mode), run on TensorFlow 2.21 with tf_keras, and written by ``tf.train.Saver``.
Thinning removes nodes that the predictions do not depend on (initialisers, saving, gradients) and attributes
that nothing reads. The other nodes are unchanged.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def thin(meta: Any) -> Any:
    """The part of a ``MetaGraphDef`` that evaluates the network."""
    nodes = {node.name: node for node in meta.graph_def.node}
    pending = [name for name, node in nodes.items() if node.op == "BiasAdd" and "-predict" in name]
    kept = set(pending)
    while pending:
        for name in (x.lstrip("^").partition(":")[0] for x in nodes[pending.pop()].input):
            if name not in kept:
                kept.add(name)
                pending.append(name)
    thinned = type(meta)()
    thinned.graph_def.versions.CopyFrom(meta.graph_def.versions)
    for name, node in nodes.items():
        if name in kept:
            copy = thinned.graph_def.node.add()
            copy.CopyFrom(node)
            for attribute in ("_output_shapes", "_class", "_has_manual_control_dependencies", "debug_name"):
                copy.attr.pop(attribute, None)
            copy.ClearField("experimental_debug_info")
    return thinned


def main() -> None:
    import tensorflow as tf

    for path in map(Path, sys.argv[1:]):
        meta = tf.compat.v1.MetaGraphDef.FromString(path.read_bytes())
        target = HERE / f"graph-{path.parent.name}.meta.gz"
        target.write_bytes(gzip.compress(thin(meta).SerializeToString(deterministic=True), mtime=0))
        print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
