"""Pack the variable names of Google's Keras model: ``python parity_tests/goldens/make_keras_names.py``.

``keras_names.json.xz``: file → key → shape, of object-based checkpoints and ``.h5`` files.
``keras_graph.xz``: the object graph of Lite0's ``ckpt-1``.
``h5_order.json``: model → layer, in order → SHA-256 of its ``weight_names``, one per line.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parity_tests.helpers.paths import GOLDENS, SHARED
from porting.checkpoint.objects.graph import GRAPH_KEY
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index

ORACLE = SHARED / "oracle"


def make_names() -> None:
    names: dict[str, dict[str, list[int]]] = {}
    for model in ("efficientdet-d0", "efficientdet-d4", "efficientdet-lite0"):
        for kind, content in (("ckpt", "variables"), ("train_ckpt-1", "variables"), ("h5", "datasets")):
            path = ORACLE / model / f"names_{'' if kind == 'h5' else 'tf2_'}{kind}.json"
            if path.exists():
                listed = json.loads(path.read_text())[content]
                names[f"{model}/{kind}"] = {key: entry["shape"] for key, entry in listed.items()}
    text = json.dumps(names, separators=(",", ":"))
    (GOLDENS / "keras_names.json.xz").write_bytes(lzma.compress(text.encode()))


def make_graph() -> None:
    bundle = TensorBundle(read_index(ORACLE / "checkpoints" / "keras-lite0" / "ckpt-1.index"))
    (GOLDENS / "keras_graph.xz").write_bytes(lzma.compress(bundle.read_string(GRAPH_KEY)))


def make_order() -> None:
    order: dict[str, dict[str, str]] = {}
    for model in ("efficientdet-d0", "efficientdet-d4", "efficientdet-lite0"):
        listed = json.loads((ORACLE / model / "names_h5.json").read_text())
        names = listed["weight_names_by_layer"]
        order[model] = {
            layer: hashlib.sha256("\n".join(names[layer]).encode()).hexdigest()
            for layer in listed["attrs"]["layer_names"]
        }
    (GOLDENS / "h5_order.json").write_text(json.dumps(order, indent=1) + "\n")


if __name__ == "__main__":
    make_names()
    make_graph()
    make_order()
