"""Images in, detections out: preprocessing, network and postprocessing, as in AutoML's evaluation.

A model whose configuration has another resizer or other anchors is run with these.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    preprocess,
    preprocess_batches,
    scaled,
)
from pytorch_model.detection.settings import TTA, NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import AUTO
from pytorch_model.engines.choose import EngineOf, Network
from pytorch_model.errors import ConfigError, WeightsError


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
    evaluation. ``tta="flip"`` also detects in each mirrored image and fuses both results, see :func:`detect`.
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
        return [
            {
                key: values[: int((found["scores"] > self.score_threshold).sum())]
                for key, values in found.items()
            }
            for batch in self.batches(images)
            for found in self.detect(batch)
        ]

    def load(self, image: ImageSource, upright: bool = False) -> DecodedImage:
        """Read one image by :func:`load_image` and check that it fits this detector's input.

        Raises :class:`~pytorch_model.detection.preprocess.ImageError`.
        """
        decoded = load_image(image, self.decoder, upright)
        size = decoded.pixels.shape[1], decoded.pixels.shape[2]
        scaled(size, self.image_size, self.model.config.resizer)
        return decoded

    def preprocess(self, images: Sequence[ImageSource] | Tensor) -> NetworkInput:
        """The network's input made of ``images``, on the model's device, see :func:`preprocess`."""
        device = next(self.model.parameters()).device
        return preprocess(images, self.model.config, self.image_size, self.decoder, device)

    def batches(self, images: Sequence[ImageSource] | Tensor) -> list[NetworkInput]:
        """As :meth:`preprocess`; several batches only if the size of the network's input varies."""
        device = next(self.model.parameters()).device
        return preprocess_batches(images, self.model.config, self.image_size, self.decoder, device)

    @torch.no_grad()
    def detect(self, batch: NetworkInput, network: Network | None = None) -> list[dict[str, Tensor]]:
        """Every detection in a preprocessed batch, whatever its score, see :func:`detect`.

        ``network``, if given, is used instead of the model.
        """
        return detect(network or self._network, batch, self._anchors(batch), self.nms, self.tta)

    def _anchors(self, batch: NetworkInput) -> Tensor:
        """The anchors of a batch: always the same if images are padded to one size."""
        config = self.model.config
        if config.resizer.pad:
            self.anchors_yxyx = self.anchors_yxyx.to(batch.images.device)
            return self.anchors_yxyx
        size = batch.images.shape[2], batch.images.shape[3]
        return generate_anchors(config, size).to(batch.images.device)

    @property
    def engine(self) -> str:
        """The name of the engine in use."""
        return self._engine.name

    def _network(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        class_outputs, box_outputs = self._engine(images)
        _check_finite([*class_outputs, *box_outputs])
        return class_outputs, box_outputs


def detect(
    network: Network, batch: NetworkInput, anchors_yxyx: Tensor, nms: NMSConfig, tta: str = "none"
) -> list[dict[str, Tensor]]:
    """The detections in a network's input: one dict per image, as :class:`Detector` returns them.

    Padding is removed. ``tta="flip"`` is AutoML's
    test-time augmentation: the input, with its padding, is mirrored and goes through network and suppression
    too; its boxes are mirrored back; :func:`weighted_boxes_fusion` makes one list of both, of at most
    2 · ``max_output_size`` detections.
    """
    found = _detect_once(network, batch.images, batch.image_scales, anchors_yxyx, nms)
    if tta == "none":
        return found
    flipped = _detect_once(network, batch.images.flip(3), batch.image_scales, anchors_yxyx, nms)
    widths = (batch.image_scales[:, 1] * batch.images.shape[3]).tolist()
    return [
        weighted_boxes_fusion([plain, mirrored(mirror, width)])
        for plain, mirror, width in zip(found, flipped, widths, strict=True)
    ]


def _detect_once(
    network: Network, images: Tensor, image_scales: Tensor, anchors_yxyx: Tensor, nms: NMSConfig
) -> list[dict[str, Tensor]]:
    class_outputs, box_outputs = network(images)
    size = (images.shape[2], images.shape[3])
    found = postprocess(class_outputs, box_outputs, anchors_yxyx, size, nms, image_scales)
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
