"""Run a TensorFlow graph and hand over its taps in order, with few activations in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

#: Bytes of activations fetched at once, at most, in addition to those that later taps need.
_AT_ONCE = 1 << 28


def run_graph(
    graph: Any,
    image: Any,
    tensors: Mapping[str, Any],
    images: np.ndarray,
    emit: Callable[[str, np.ndarray], None],
) -> None:
    """Run ``graph`` on ``images`` and call ``emit`` with (tap, array) for each of ``tensors``, in order.

    ``image``: the tensor that takes ``images``, [N, H, W, 3]. Some taps are computed at a time, from the
    earlier taps they need. A tap is dropped when no later one needs it.
    """
    import tensorflow as tf

    options = tf.compat.v1.ConfigProto()
    # Switched off, because it would fuse, fold and reorder the operations to be compared.
    options.graph_options.rewrite_options.disable_meta_optimizer = True
    stretches = list(_stretches(tensors))
    needs = [_needs(names, tensors, image, stretches[:i]) for i, names in enumerate(stretches)]
    held: dict[str, np.ndarray] = {image.name: np.asarray(images, np.float32)}
    with tf.compat.v1.Session(graph=graph, config=options) as session:
        for i, names in enumerate(stretches):
            fed = {key: held[key] for key in needs[i]}
            # Two taps may be one tensor, if a resampling has nothing to do.
            asked = {tensors[name].name: tensors[name] for name in names if tensors[name].name not in fed}
            values = {**fed, **session.run(asked, fed)}
            later = set().union(*needs[i + 1 :])
            held = {key: value for key, value in {**held, **values}.items() if key in later}
            for name in names:
                # A session's arrays may be views of TensorFlow's memory; torch needs writable ones.
                emit(name, np.array(values[tensors[name].name]))


def _stretches(tensors: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of consecutive taps, each list of at most ``_AT_ONCE`` bytes or of one tap."""
    names: list[str] = []
    total = 0
    for name, tensor in tensors.items():
        size = int(np.prod([n or 1 for n in tensor.shape])) * tensor.dtype.size
        if names and total + size > _AT_ONCE:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _needs(names: list[str], tensors: Mapping[str, Any], image: Any, before: list[list[str]]) -> set[str]:
    """The earlier taps, or the image, from which the taps ``names`` are computed."""
    known = {tensors[name].name for stretch in before for name in stretch} | {image.name}
    needed: set[str] = set()
    pending = [tensors[name] for name in names]
    seen = {tensor.name for tensor in pending}
    while pending:
        tensor = pending.pop()
        if tensor.name in known:
            needed.add(tensor.name)
            continue
        for parent in tensor.op.inputs:
            if parent.name not in seen:
                seen.add(parent.name)
                pending.append(parent)
    return needed
