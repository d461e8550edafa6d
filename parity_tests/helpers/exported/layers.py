"""The TensorFlow reference with the operations, and the names of operations, of AutoML's Keras layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from porting.scopes import numbered


class Variables(dict[str, Any]):
    """Variables by name that remember which was asked for last: the scope of a depthwise convolution."""

    last = ""

    def __getitem__(self, name: str) -> Any:
        self.last = name
        return super().__getitem__(name)


@contextmanager
def keras_layers(tf: Any, variables: Variables) -> Iterator[None]:
    """Inside, ``tf_reference`` builds fused batch norms, bias operations and name scopes, as Keras does."""

    def biased(net: Any, x: Any, scope: str) -> Any:
        bias = f"{scope}/bias"
        return tf.nn.bias_add(x, net[bias]) if bias in net.variables else x

    def conv(net: Any, x: Any, scope: str, stride: int = 1) -> Any:
        with tf.name_scope(scope):
            return biased(net, tf.nn.conv2d(x, net[f"{scope}/kernel"], stride, "SAME"), scope)

    def depthwise_conv(x: Any, kernel: Any, stride: int = 1) -> Any:
        with tf.name_scope(variables.last.rpartition("/")[0]):
            return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME")

    def separable_conv(net: Any, x: Any, scope: str) -> Any:
        with tf.name_scope(scope), tf.name_scope("separable_conv2d"):
            x = tf.nn.depthwise_conv2d(x, net[f"{scope}/depthwise_kernel"], [1, 1, 1, 1], "SAME")
            return biased(net, tf.nn.conv2d(x, net[f"{scope}/pointwise_kernel"], 1, "SAME"), scope)

    def batch_norm(net: Any, x: Any, scope: str) -> Any:
        values = (net[f"{scope}/{leaf}"] for leaf in ("gamma", "beta", "moving_mean", "moving_variance"))
        with tf.name_scope(scope):
            return tf.compat.v1.nn.fused_batch_norm(x, *values, epsilon=1e-3, is_training=False)[0]

    def fuse(net: Any, inputs: list[Any], scope: str, method: str) -> Any:
        if method == "sum":
            return net.tap(f"{scope}/fuse", tf.add_n(inputs))
        with tf.name_scope(scope):
            weights = [tf.nn.relu(net[numbered(f"{scope}/WSM", i)]) for i in range(len(inputs))]
            total = tf.add_n(weights) + 1e-4
            return tf.add_n([x * w / total for x, w in zip(inputs, weights, strict=True)])

    def activation(x: Any, act_type: str) -> Any:
        return tf.nn.relu6(x) if act_type == "relu6" else tf.nn.swish(x)

    layers = (conv, depthwise_conv, separable_conv, batch_norm, fuse, activation)
    with ExitStack() as stack:
        for module in ("layers", "efficientnet", "bifpn", "heads"):
            for layer in layers:
                target = f"tf_reference.{module}"
                if hasattr(__import__(target, fromlist=["_"]), layer.__name__):
                    stack.enter_context(mock.patch(f"{target}.{layer.__name__}", layer))
        nearest = tf.compat.v1.image.resize_nearest_neighbor
        stack.enter_context(mock.patch("tf_reference.bifpn.nearest_resize", nearest))
        yield
