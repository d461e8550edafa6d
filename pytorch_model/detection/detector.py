"""Images in, detections out: preprocessing, the network and postprocessing as AutoML evaluates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.ensemble import mirrored, weighted_boxes_fusion
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.detection.preprocess import (
    DecodedImage,
    ImageSource,
    NetworkInput,
    load_image,
    preprocess,
    scale_to_fit,
)
from pytorch_model.detection.settings import TTA, NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError, WeightsError

#: float32 [N, 3, H, W] → (class_outputs, box_outputs), as ``EfficientDet`` returns them.
Network: TypeAlias = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]


class Detector:
    """A model as a function from images to detections::

        detector = Detector(load_model("efficientdet_d0.safetensors"))
        for detections in detector(["street.jpg"]):
            print(detections["boxes"], detections["scores"], detections["labels"])

    ``model`` is put into evaluation mode and used where it is; move it before. ``image_size`` (height, width)
    is the network's input, ``config.image_size`` unless given. ``nms`` defaults to AutoML's evaluation.
    Detections whose score does not exceed ``score_threshold`` are left out. ``decoder`` is described at
    :func:`~pytorch_model.detection.preprocess.load_image`: ``"fast-dct"`` sees the pixels that AutoML's
    evaluation sees.
    ``tta="flip"`` also looks at each image's mirror image and fuses what is found, see :func:`detect`.
    Raises :class:`ConfigError` for a ``score_threshold`` that is not a score, or another ``tta``.
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
        self.anchors_yxyx = generate_anchors(model.config, self.image_size)

    @torch.no_grad()  # not inference_mode: its tensors refuse in-place changes, and callers scale boxes
    def __call__(self, images: Sequence[ImageSource] | Tensor) -> list[dict[str, Tensor]]:
        """Detect in one batch of images, given as for :func:`pytorch_model.detection.preprocess.preprocess`.

        Returns one dict per image, as torchvision's detectors do: ``boxes`` float32 [n, 4], order xyxy, in
        pixels of the image given and not clipped to it; ``scores`` float32 [n], descending; ``labels`` int64
        [n], class ids from 1 (COCO's own ids for COCO weights). All on the model's device.
        Raises :class:`~pytorch_model.detection.preprocess.ImageError` on a bad image and
        :class:`WeightsError` when the network's output is not finite.
        """
        return [
            {
                key: values[: int((found["scores"] > self.score_threshold).sum())]
                for key, values in found.items()
            }
            for found in self.detect(self.preprocess(images))
        ]

    def load(self, image: ImageSource, upright: bool = False) -> DecodedImage:
        """Read one image by :func:`load_image` and check that it fits this detector's input.

        Raises :class:`~pytorch_model.detection.preprocess.ImageError`.
        """
        decoded = load_image(image, self.decoder, upright)
        scale_to_fit((decoded.pixels.shape[1], decoded.pixels.shape[2]), self.image_size)
        return decoded

    def preprocess(self, images: Sequence[ImageSource] | Tensor) -> NetworkInput:
        """``images``, as above, as the network's input, on the model's device."""
        device = next(self.model.parameters()).device
        return preprocess(images, self.model.config, self.image_size, self.decoder, device)

    @torch.no_grad()
    def detect(self, batch: NetworkInput, network: Network | None = None) -> list[dict[str, Tensor]]:
        """Every detection in a preprocessed batch, with another ``network`` in the model's place if given.

        As :func:`detect`, whatever the score.
        """
        self.anchors_yxyx = self.anchors_yxyx.to(batch.images.device)
        return detect(network or self._network, batch, self.anchors_yxyx, self.nms, self.tta)

    def _network(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        class_outputs, box_outputs = self.model(images.to(next(self.model.parameters()).dtype))
        _check_finite([*class_outputs, *box_outputs])
        return class_outputs, box_outputs


def detect(
    network: Network, batch: NetworkInput, anchors_yxyx: Tensor, nms: NMSConfig, tta: str = "none"
) -> list[dict[str, Tensor]]:
    """From the network's input to detections: one dict per image as :class:`Detector` returns them.

    Padding is left out. ``tta="flip"``, after AutoML's evaluation with test-time augmentation: the input is
    mirrored, padding and all, and goes through network and suppression as the plain one does; boxes are
    mirrored back; :func:`weighted_boxes_fusion` makes one list of both, up to 2 · ``max_output_size`` long.
    """
    found = _detect_once(network, batch.images, batch.image_scales, anchors_yxyx, nms)
    if tta == "none":
        return found
    flipped = _detect_once(network, batch.images.flip(3), batch.image_scales, anchors_yxyx, nms)
    widths = (batch.image_scales * batch.images.shape[3]).tolist()
    return [
        weighted_boxes_fusion([plain, mirrored(mirror, width)])
        for plain, mirror, width in zip(found, flipped, widths, strict=True)
    ]


def _detect_once(
    network: Network, images: Tensor, image_scales: Tensor, anchors_yxyx: Tensor, nms: NMSConfig
) -> list[dict[str, Tensor]]:
    class_outputs, box_outputs = network(images)
    found = postprocess_per_class(class_outputs, box_outputs, anchors_yxyx, nms, image_scales)
    boxes_xyxy = found.boxes_yxyx[..., [1, 0, 3, 2]]
    # Scores descend and padding has score 0, so what is kept comes first.
    counts = (found.scores > 0).sum(dim=1).tolist()
    return [
        {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
        for boxes, scores, labels, count in zip(boxes_xyxy, found.scores, found.classes, counts, strict=True)
    ]


def _check_finite(outputs: Sequence[Tensor]) -> None:
    # One NaN or infinity makes the sum one, and a sum is cheaper than looking at every element.
    sums = torch.stack([output.sum(dtype=torch.float32) for output in outputs])
    if not sums.isfinite().all():
        raise WeightsError(
            "the network's output is not finite (NaN or infinity): the weights are damaged or do not fit "
            "this model, or its precision is too low; convert them again or use float32"
        )
