"""AutoML's network in plain TensorFlow operations, as one graph: ``tf.function`` of :mod:`tf_reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from porting.bench.sides import Runner, Setup
from porting.errors import ConfigError
from porting.reverse import reverse
from tf_reference.efficientdet import as_tensors, efficientdet


def make(setup: Setup) -> Runner:
    """Images go in as NHWC, TensorFlow's own layout. Raises :class:`ConfigError` if it lacks the device."""
    if setup.device.type != "cpu" and not tf.config.list_physical_devices("GPU"):
        raise ConfigError(f"this TensorFlow cannot compute on {setup.device.type}; leave the side out")
    tf.config.threading.set_intra_op_parallelism_threads(setup.threads)
    tf.config.threading.set_inter_op_parallelism_threads(setup.threads)
    config = setup.weights.config
    variables = as_tensors(reverse(setup.weights.state_dict, config))

    network = tf.function(lambda images: efficientdet(variables, config, images))

    return Runner(_prepare, lambda images: _arrays(network(images)), _nchw)


def _prepare(images: np.ndarray) -> Any:
    return tf.constant(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


def _arrays(outputs: Any) -> list[np.ndarray]:
    """Waits until they are computed; on a CPU nothing is copied."""
    return [x.numpy() for kind in outputs for x in kind]


def _nchw(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [array.transpose(0, 3, 1, 2) for array in arrays]
