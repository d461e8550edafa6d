"""Images in, detections out: preprocessing, network and postprocessing, as in AutoML's evaluation.

A model whose configuration has another resizer or other anchors is run with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.ensemble import mirrored, weighted_boxes_fusion
from pytorch_model.detection.postprocess import postprocess
from pytorch_model.detection.preprocess import (
    DecodedImage,
    ImageSource,
    NetworkInput,
    load_image,
    network_input,
    preprocess,
    preprocess_batches,
    scaled,
)
from pytorch_model.detection.settings import TTA, NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import AUTO, ENGINES, FLOAT32
from pytorch_model.engines.choose import EngineOf, Network
from pytorch_model.errors import ConfigError, WeightsError
from pytorch_model.weights.tensors import dtype_name


class HeadOutputs(NamedTuple):
    """What the network made of a batch, and what postprocessing needs beside it."""

    runs: list[tuple[Sequence[Tensor], Sequence[Tensor]]]  # (class_outputs, box_outputs); of tta="flip" two
    size: tuple[int, int]  # height, width of the network's input
    image_scales: Tensor  # float32 [N, 2], as in NetworkInput
    anchors_yxyx: Tensor  # float32 [A, 4]


class Detector:
    """A model as a function from images to detections::

        detector = Detector(load_model("efficientdet_d0.safetensors"))
        for detections in detector(["street.jpg"]):
            print(detections["boxes"], detections["scores"], detections["labels"])

    ``model`` is put into evaluation mode and stays on its device; move it before. ``image_size`` (height,
    width) of the network's input defaults to ``config.image_size``. ``nms`` defaults to AutoML's evaluation;
    ``NMSConfig(scope="global", max_nms_inputs=0)`` is what AutoML's exported models do.
    Only detections with a score above ``score_threshold`` are returned. ``decoder`` is described at
    :func:`~pytorch_model.detection.preprocess.load_image`: ``"fast-dct"`` gives the pixels of AutoML's
    evaluation. ``tta="flip"`` also detects in each mirrored image and fuses both results, see :meth:`select`.
    ``engine``: what computes the network, one of :data:`pytorch_model.engines.NAMES`; the attribute names
    the one in use. Images of another size than ``image_size`` go to the model itself. Raises
    :class:`ConfigError` for a ``score_threshold`` outside 0…1, an unknown ``tta``, or an engine that is
    unknown or not installed.
    """

    def __init__(
        self,
        model: EfficientDet,
        *,
        image_size: tuple[int, int] | None = None,
        nms: NMSConfig | None = None,
        score_threshold: float = 0.0,
        decoder: str = "pillow",
        tta: str = "none",
        engine: str = AUTO,
    ) -> None:
        if tta not in TTA:
            raise ConfigError(f"tta is {tta!r}, must be one of {', '.join(TTA)}")
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold is {score_threshold}, must be from 0 to 1")
        self.model = model.eval()
        self.image_size = image_size or model.config.image_size
        self.nms = nms or NMSConfig()
        self.score_threshold = score_threshold
        self.decoder = decoder
        self.tta = tta
        self._engine = EngineOf(engine, self.model, model.config.resizer.padded(self.image_size))
        self.anchors_yxyx = generate_anchors(model.config, self.image_size)

    @torch.no_grad()  # not inference_mode: its tensors forbid in-place changes, and callers scale boxes
    def __call__(self, images: Sequence[ImageSource] | Tensor) -> list[dict[str, Tensor]]:
        """Detect in one batch of images, see :func:`pytorch_model.detection.preprocess.preprocess`.

        Returns one dict per image, as torchvision's detectors do: ``boxes`` float32 [n, 4], order xyxy, in
        pixels of the given image, not clipped to it (with global suppression, to the network's input);
        ``scores`` float32 [n], descending; ``labels`` int64 [n], class ids from 1 (COCO's own ids for COCO
        weights). All on the model's device.
        Raises :class:`~pytorch_model.detection.preprocess.ImageError` on a bad image and
        :class:`WeightsError` if the network's output is not finite.
        """
        return [self.above_threshold(found) for batch in self.batches(images) for found in self.detect(batch)]

    def above_threshold(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those detections of one image that have a score above ``score_threshold``."""
        count = int((found["scores"] > self.score_threshold).sum())
        return {key: values[:count] for key, values in found.items()}

    def load(self, image: ImageSource, upright: bool = False) -> DecodedImage:
        """Read one image by :func:`load_image` and check that it fits this detector's input.

        Raises :class:`~pytorch_model.detection.preprocess.ImageError`.
        """
        decoded = load_image(image, self.decoder, upright)
        size = decoded.pixels.shape[1], decoded.pixels.shape[2]
        scaled(size, self.image_size, self.model.config.resizer)
        return decoded

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def prepare(self, image: DecodedImage) -> NetworkInput:
        """The network's input made of one image, on the model's device; :func:`stacked` makes batches.

        If the pixels are in pinned memory, nothing waits for their copy to a GPU.
        """
        pixels = image.pixels[None].to(self.device, non_blocking=True)
        return network_input(pixels, self.model.config, self.image_size, (image.decoder,))

    def preprocess(self, images: Sequence[ImageSource] | Tensor) -> NetworkInput:
        """The network's input made of ``images``, on the model's device, see :func:`preprocess`."""
        return preprocess(images, self.model.config, self.image_size, self.decoder, self.device)

    def batches(self, images: Sequence[ImageSource] | Tensor) -> list[NetworkInput]:
        """As :meth:`preprocess`; several batches only if the size of the network's input varies."""
        return preprocess_batches(images, self.model.config, self.image_size, self.decoder, self.device)

    def detect(self, batch: NetworkInput, network: Network | None = None) -> list[dict[str, Tensor]]:
        """Every detection in a preprocessed batch, whatever its score.

        Padding is removed. ``network``, if given, is used instead of the model.
        """
        return self.select(self.compute(batch, network))

    @torch.no_grad()
    def compute(self, batch: NetworkInput, network: Network | None = None) -> HeadOutputs:
        """The first half of :meth:`detect`: the network, on the batch and for ``tta`` on its mirror image."""
        network = network or self._network
        runs = [network(batch.images)]
        if self.tta != "none":
            runs.append(network(batch.images.flip(3)))
        size = batch.images.shape[2], batch.images.shape[3]
        return HeadOutputs(runs, size, batch.image_scales, self._anchors(batch))

    @torch.no_grad()
    def select(self, outputs: HeadOutputs) -> list[dict[str, Tensor]]:
        """The second half of :meth:`detect`: postprocessing.

        ``tta="flip"`` is AutoML's test-time augmentation: the input, with its padding, was mirrored, and goes
        through suppression too; its boxes are mirrored back; :func:`weighted_boxes_fusion` makes one list of
        both, of at most 2 · ``max_output_size`` detections.
        """
        runs = [detections_in(heads, outputs, self.nms) for heads in outputs.runs]
        if self.tta == "none":
            return runs[0]
        widths = (outputs.image_scales[:, 1] * outputs.size[1]).tolist()
        return [
            weighted_boxes_fusion([plain, mirrored(mirror, width)])
            for plain, mirror, width in zip(*runs, widths, strict=True)
        ]

    def _anchors(self, batch: NetworkInput) -> Tensor:
        """The anchors of a batch: always the same if images are padded to one size."""
        config = self.model.config
        if config.resizer.pad:
            self.anchors_yxyx = self.anchors_yxyx.to(batch.images.device)
            return self.anchors_yxyx
        size = batch.images.shape[2], batch.images.shape[3]
        return generate_anchors(config, size).to(batch.images.device)

    @property
    def precision(self) -> str:
        """What the network computes with: ``float32``, ``bfloat16``, …"""
        engine = ENGINES[self.engine]
        return FLOAT32 if engine.only_float32 else dtype_name(next(self.model.parameters()))

    @property
    def engine(self) -> str:
        """The name of the engine in use."""
        return self._engine.name

    def _network(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        class_outputs, box_outputs = self._engine(images)
        _check_finite([*class_outputs, *box_outputs])
        return class_outputs, box_outputs


def detections_in(
    heads: tuple[Sequence[Tensor], Sequence[Tensor]], about: HeadOutputs, nms: NMSConfig
) -> list[dict[str, Tensor]]:
    """The detections of each image in ``heads``, one of ``about.runs``, without padding."""
    found = postprocess(*heads, about.anchors_yxyx, about.size, nms, about.image_scales)
    boxes_xyxy = found.boxes_yxyx[..., [1, 0, 3, 2]]
    # Scores descend and padding has score 0, so the detections come first.
    counts = (found.scores > 0).sum(dim=1).tolist()
    return [
        {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
        for boxes, scores, labels, count in zip(boxes_xyxy, found.scores, found.classes, counts, strict=True)
    ]


def _check_finite(outputs: Sequence[Tensor]) -> None:
    # One NaN or infinity makes the sum NaN or infinite, and a sum is cheaper than a check of every element.
    sums = torch.stack([output.sum(dtype=torch.float32) for output in outputs])
    if not sums.isfinite().all():
        raise WeightsError(
            "the network's output is not finite (NaN or infinity): the weights are damaged or do not fit "
            "this model, or its precision is too low; convert them again or use float32"
        )
