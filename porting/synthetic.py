"""Seeded, healthy weights for any configuration, so that every variant can be tried without a download.

Does not import TensorFlow. Kernels are random. The moving statistics of each batch norm are those of a few
seeded images at that point: the network runs once in NumPy while its weights are drawn, so activations stay
of order one at every depth. The network runs in float64 and the statistics are rounded, so that the values
are the same on every machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from porting.scopes import EMA_SUFFIX, MOMENTUM_SUFFIX
from pytorch_model.config import BN_EPSILON, Block, EfficientDetConfig
from tf_reference.variables import variables

GLOBAL_STEP = 300_000

RESIDUAL_GAIN = 0.5  # on gammas of projections before a shortcut, so that depth adds little variance
SMALLEST_MAP = 8  # pixels per side; P6 and up are calibrated as if the images were larger
CALIBRATION_IMAGES, CALIBRATION_SIZE = 4, 256  # how many images give the statistics; pixels per side


def synthetic_variables(config: EfficientDetConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Name → float32 array for every model variable: the averaged (EMA) values."""
    writer = _Writer(config, seed)
    writer.network()
    return writer.values


def synthetic_checkpoint(
    config: EfficientDetConfig, seed: int = 0, momentum: bool = False
) -> dict[str, np.ndarray]:
    """The content of a released checkpoint: raw values, a moving average for each, and ``global_step``.

    The raw values are the averages plus noise, as late in a real training run. ``momentum`` adds the
    optimizer's slots, as in a checkpoint saved for resuming.
    """
    content: dict[str, np.ndarray] = {"global_step": np.array(GLOBAL_STEP, np.int64)}
    trainable = {variable.name for variable in variables(config) if variable.trainable}
    for name, average in synthetic_variables(config, seed).items():
        # In float64: float32's exp and std differ between machines in their last digits.
        noise = _rng(seed, "raw", name).standard_normal(average.shape, np.float32).astype(np.float64)
        if name.endswith("moving_variance"):
            raw = average * np.exp(0.1 * noise)
        else:
            raw = average + 0.1 * (float(np.std(average, dtype=np.float64)) + 0.02) * noise
        content[name] = np.asarray(raw, np.float32)
        content[name + EMA_SUFFIX] = average
        if momentum and name in trainable:
            slot = _rng(seed, "momentum", name).standard_normal(average.shape, np.float32)
            content[name + MOMENTUM_SUFFIX] = np.asarray(1e-3 * slot, np.float32)
    return content


def synthetic_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A seeded image, uint8 [height, width, 3]: patches at every scale, flat areas, a little noise."""
    rng = _rng(seed, "image", height, width)
    image = np.zeros((height, width, 3))
    cells = 2
    while cells < min(height, width):
        coarse = rng.normal(size=(cells, cells, 3))
        rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
        image += coarse[rows][:, columns]
        cells *= 2
    for _ in range(8):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + height // 4, left : left + width // 4] = rng.normal(0, 3, 3)
    image = image / image.std() + 0.1 * rng.normal(size=image.shape)
    return np.clip(120 + 60 * image, 0, 255).astype(np.uint8)


def _rng(seed: int, *keys: object) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(str(key).encode()) for key in keys)])


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _swish(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _rounded(x: np.ndarray) -> np.ndarray:
    """``x`` with 10 bits of mantissa, because the last digits of a sum depend on the machine's order of
    adding.

    Only float64 is precise enough for this: one value that is rounded differently changes everything after
    it.
    """
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 1024) / 1024, exponent)


def _same_slices(x: np.ndarray, kernel: int, stride: int) -> Iterator[np.ndarray]:
    """The kernel² shifted views of [N, H, W, C] under SAME padding, row by row.

    Padding wraps around instead of being zero, so that at any size the statistics are those of an image's
    inside. Deep maps here are mostly border; those of larger images are not.
    """
    out = [-(-n // stride) for n in x.shape[1:3]]
    pads = [max((o - 1) * stride + kernel - n, 0) for o, n in zip(out, x.shape[1:3], strict=True)]
    before = [p // 2 for p in pads]
    widths = [(0, 0), *((b, p - b) for b, p in zip(before, pads, strict=True)), (0, 0)]
    x = np.pad(x, widths, mode="wrap")
    for i in range(kernel):
        for j in range(kernel):
            yield x[:, i : i + (out[0] - 1) * stride + 1 : stride, j : j + (out[1] - 1) * stride + 1 : stride]


class _Writer:
    """Walks through the network once, draws every variable and runs it. Maps are float64 [N, H, W, C]."""

    def __init__(self, config: EfficientDetConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.values: dict[str, np.ndarray] = {}
        self.act = _ACTIVATIONS.get(config.act_type, _swish)

    def draw(
        self, name: str, shape: tuple[int, ...], spread: float | np.ndarray, centre: float = 0.0
    ) -> np.ndarray:
        """A normal variable called ``name``."""
        value = centre + spread * _rng(self.seed, name).standard_normal(shape, np.float32)
        self.values[name] = np.asarray(value, np.float32)
        return self.values[name]

    # --- operations ---

    def conv(self, name: str, x: np.ndarray, filters: int, gain: float = 1.0) -> np.ndarray:
        fan_in = x.shape[-1]
        return x @ self.draw(name, (1, 1, fan_in, filters), gain / np.sqrt(fan_in))[0, 0]

    def bias(self, name: str, filters: int, centre: float = 0.0, spread: float = 0.1) -> np.ndarray:
        return self.draw(name, (filters,), spread, centre)

    def depthwise(self, name: str, x: np.ndarray, kernel: int, stride: int = 1) -> np.ndarray:
        """Half of the kernel's energy is in its centre, the only tap that a 1×1 map sees."""
        spread = np.full((kernel, kernel, 1, 1), np.sqrt(0.5 / (kernel * kernel - 1)))
        spread[kernel // 2, kernel // 2] = np.sqrt(0.5)
        weights = self.draw(name, (kernel, kernel, x.shape[-1], 1), spread)
        taps = weights.reshape(kernel * kernel, -1)
        slices = _same_slices(x, kernel, stride)
        return np.asarray(sum(view * tap for view, tap in zip(slices, taps, strict=True)))

    def separable(self, scope: str, x: np.ndarray, filters: int, gain: float = 1.0) -> np.ndarray:
        x = self.depthwise(f"{scope}/depthwise_kernel", x, 3)
        return self.conv(f"{scope}/pointwise_kernel", x, filters, gain)

    def bn(self, scope: str, x: np.ndarray, gain: float = 1.0) -> np.ndarray:
        rng, filters = _rng(self.seed, scope), x.shape[-1]
        gamma: np.ndarray = gain * np.asarray(rng.uniform(0.5, 1.5, filters))
        beta: np.ndarray = np.asarray(rng.normal(0, 0.1, filters))
        # A small map has few samples per channel, so the mean over all channels gets more weight.
        samples = x.size // filters
        trust = samples / (samples + 32)
        mean = _rounded(trust * x.mean((0, 1, 2)))
        deviation = np.square(x - mean).mean((0, 1, 2))
        variance = _rounded(trust * deviation + (1 - trust) * deviation.mean() + 1e-3)
        statistics = {
            "gamma": gamma,
            "beta": beta,
            "moving_mean": mean,
            "moving_variance": variance,
        }
        for leaf, value in statistics.items():
            self.values[f"{scope}/{leaf}"] = value.astype(np.float32)
        return (x - mean) * (gamma / np.sqrt(variance + BN_EPSILON)) + beta

    def max_pool(self, x: np.ndarray) -> np.ndarray:
        """Window 3, SAME, as AutoML's resampling between neighbouring levels.

        Halves maps down to ``SMALLEST_MAP`` and keeps that size for higher levels: a map of a few pixels
        would give statistics that fit no other image.
        """
        stride = 2 if x.shape[1] > SMALLEST_MAP else 1
        return np.max(list(_same_slices(x, 3, stride)), axis=0)

    # --- parts of the network ---

    def network(self) -> None:
        config = self.config
        size = CALIBRATION_SIZE
        images = np.stack([synthetic_image(size, size, self.seed + i) for i in range(CALIBRATION_IMAGES)])
        endpoints = self.backbone((images - np.array(config.mean_rgb)) / np.array(config.stddev_rgb))
        features = [endpoints[level] for level in config.levels if level in endpoints]
        for level in config.extra_levels:
            features.append(self.max_pool(self.match_width(f"resample_p{level}", features[-1])))
        for cell in range(config.fpn_cell_repeats):
            features = self.cell(f"fpn_cells/cell_{cell}", features)
        self.head("class", config.num_classes, features, centre=-np.log(99.0), gain=1.5)
        self.head("box", 4, features, centre=0.0, gain=0.4)

    def backbone(self, images: np.ndarray) -> dict[int, np.ndarray]:
        config = self.config.backbone
        stem = f"{config.name}/stem"
        kernel = self.draw(f"{stem}/conv2d/kernel", (3, 3, 3, config.stem_filters), 1 / np.sqrt(27))
        taps = kernel.reshape(9, 3, -1)
        x = sum(view @ tap for view, tap in zip(_same_slices(images, 3, 2), taps, strict=True))
        x = self.act(self.bn(f"{stem}/tpu_batch_normalization", np.asarray(x)))
        outputs = []
        for i, block in enumerate(config.blocks):
            x = self.block(f"{config.name}/blocks_{i}", block, x)
            outputs.append(x)
        return {level: outputs[i] for level, i in config.reduction_blocks.items()}

    def block(self, scope: str, block: Block, x: np.ndarray) -> np.ndarray:
        shortcut, project = x, "conv2d"
        bns = iter(f"{scope}/tpu_batch_normalization{suffix}" for suffix in ("", "_1", "_2"))
        if block.expand_ratio != 1:
            project = "conv2d_1"
            x = self.conv(f"{scope}/conv2d/kernel", x, block.expanded_filters)
            x = self.act(self.bn(next(bns), x))
        name = f"{scope}/depthwise_conv2d/depthwise_kernel"
        x = self.act(self.bn(next(bns), self.depthwise(name, x, block.kernel_size, block.stride)))
        if block.se_filters:
            x = self.squeeze_excite(f"{scope}/se", x, block.se_filters)
        x = self.conv(f"{scope}/{project}/kernel", x, block.out_filters)
        x = self.bn(next(bns), x, RESIDUAL_GAIN if block.has_residual else 1.0)
        return x + shortcut if block.has_residual else x

    def squeeze_excite(self, scope: str, x: np.ndarray, filters: int) -> np.ndarray:
        gate = self.conv(f"{scope}/conv2d/kernel", x.mean((1, 2), keepdims=True), filters)
        gate = self.act(gate + self.bias(f"{scope}/conv2d/bias", filters))
        gate = self.conv(f"{scope}/conv2d_1/kernel", gate, x.shape[-1], gain=2.0)
        return x * _sigmoid(gate + self.bias(f"{scope}/conv2d_1/bias", x.shape[-1], centre=1.0))

    def match_width(self, scope: str, x: np.ndarray) -> np.ndarray:
        filters = self.config.fpn_num_filters
        if x.shape[-1] == filters:
            return x
        x = self.conv(f"{scope}/conv2d/kernel", x, filters) + self.bias(f"{scope}/conv2d/bias", filters)
        return self.bn(f"{scope}/bn", x)

    def cell(self, scope: str, features: list[np.ndarray]) -> list[np.ndarray]:
        config, nodes, levels = self.config, list(features), list(self.config.levels)
        last: dict[int, np.ndarray] = {}
        for n, node in enumerate(config.bifpn_nodes):
            height, width = features[node.level - config.min_level].shape[1:3]
            fnode, inputs = f"{scope}/fnode{n}", []
            for i, source in enumerate(node.inputs):
                x = self.match_width(f"{fnode}/resample_{i}_{source}_{node.id}", nodes[source])
                if levels[source] < node.level:
                    x = self.max_pool(x)
                elif x.shape[1] < height:
                    rows, columns = (np.arange(n) * x.shape[a] // n for n, a in ((height, 1), (width, 2)))
                    x = x[:, rows][:, :, columns]
                inputs.append(x)
            x = self.fuse(fnode, inputs)
            after = f"{fnode}/op_after_combine{node.id}"
            x = self.separable(f"{after}/conv", x if config.conv_bn_act_pattern else self.act(x), x.shape[-1])
            if not config.conv_bn_act_pattern:
                x = x + self.bias(f"{after}/conv/bias", x.shape[-1])
            x = self.bn(f"{after}/bn", x)
            nodes.append(self.act(x) if config.conv_bn_act_pattern else x)
            levels.append(node.level)
            last[node.level] = nodes[-1]
        return [last[level] for level in config.levels]

    def fuse(self, scope: str, inputs: list[np.ndarray]) -> np.ndarray:
        method = self.config.fpn_weight_method
        if method == "sum":
            return np.sum(inputs, axis=0)
        shape = (len(inputs), self.config.fpn_num_filters if method.startswith("channel_") else 1)
        raw = _rng(self.seed, scope, "WSM").uniform(0.3, 1.5, shape).astype(np.float32)
        # One weight in ten is negative, so that the relu of fast attention matters. The first input of a node
        # never has a negative weight, or the node could vanish.
        raw[1:] *= np.where(_rng(self.seed, scope, "sign").uniform(size=raw[1:].shape) < 0.1, -1, 1)
        for i, weight in enumerate(raw):
            name = f"{scope}/WSM" + (f"_{i}" if i else "")
            self.values[name] = weight if method.startswith("channel_") else weight[0]
        weights = np.maximum(raw, 0) if method.endswith("fastattn") else np.exp(raw)
        return np.sum([x * w for x, w in zip(inputs, weights / weights.sum(0), strict=True)], axis=0)

    def head(self, kind: str, outputs: int, features: list[np.ndarray], centre: float, gain: float) -> None:
        config, filters = self.config, self.config.fpn_num_filters
        scope, maps = f"{kind}_net/{kind}", list(features)
        for i in range(config.box_class_repeats):
            bias = self.bias(f"{scope}-{i}/bias", filters)
            for index, level in enumerate(config.levels):
                y = self.separable(f"{scope}-{i}", maps[index], filters) + bias
                y = self.act(self.bn(f"{scope}-{i}-bn-{level}", y))
                maps[index] = maps[index] + y if i > 0 and config.survival_prob else y
        self.separable(f"{scope}-predict", maps[0], config.num_anchors * outputs, gain)
        self.bias(f"{scope}-predict/bias", config.num_anchors * outputs, centre, 0.3 if centre else 0.1)
