"""Images in, detections out: preprocessing, the network and postprocessing as AutoML evaluates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytorch_model.anchors import generate_anchors
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError, WeightsError
from pytorch_model.postprocess import Detections, NMSConfig, postprocess_per_class
from pytorch_model.preprocess import ImageSource, preprocess


class Detector:
    """A model as a function from images to detections::

        detector = Detector(load_model("efficientdet_d0.safetensors"))
        for detections in detector(["street.jpg"]):
            print(detections["boxes"], detections["scores"], detections["labels"])

    ``model`` is put into evaluation mode and used where it is; move it before. ``image_size`` (height, width)
    is the network's input, ``config.image_size`` unless given. ``nms`` defaults to AutoML's evaluation.
    Detections whose score does not exceed ``score_threshold`` are left out. ``decoder`` is described at
    :func:`pytorch_model.preprocess.load_image`: ``"fast-dct"`` sees the very pixels AutoML's evaluation sees.
    Raises :class:`ConfigError` for a ``score_threshold`` that is not a score.
    """

    def __init__(
        self,
        model: EfficientDet,
        *,
        image_size: tuple[int, int] | None = None,
        nms: NMSConfig | None = None,
        score_threshold: float = 0.0,
        decoder: str = "pillow",
    ) -> None:
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold is {score_threshold}, must be from 0 to 1")
        self.model = model.eval()
        self.image_size = image_size or model.config.image_size
        self.nms = nms or NMSConfig()
        self.score_threshold = score_threshold
        self.decoder = decoder
        self._anchors_yxyx = generate_anchors(model.config, self.image_size)

    @torch.no_grad()  # not inference_mode: its tensors refuse in-place changes, and callers scale boxes
    def __call__(self, images: Sequence[ImageSource] | Tensor) -> list[dict[str, Tensor]]:
        """Detect in one batch of images, given as for :func:`pytorch_model.preprocess.preprocess`.

        Returns one dict per image, as torchvision's detectors do: ``boxes`` float32 [n, 4], order xyxy, in
        pixels of the image given and not clipped to it; ``scores`` float32 [n], descending; ``labels`` int64
        [n], class ids from 1 (COCO's own ids for COCO weights). All on the model's device.
        Raises :class:`~pytorch_model.preprocess.ImageError` on a bad image and :class:`WeightsError` when the
        network's output is not finite.
        """
        detections = self._detect(images)
        # Scores descend and padding has score 0, so what is kept comes first.
        counts = (detections.scores > self.score_threshold).sum(dim=1).tolist()
        boxes_xyxy = detections.boxes_yxyx[..., [1, 0, 3, 2]]
        return [
            {
                "boxes": boxes_xyxy[i, :count],
                "scores": detections.scores[i, :count],
                "labels": detections.classes[i, :count],
            }
            for i, count in enumerate(counts)
        ]

    def _detect(self, images: Sequence[ImageSource] | Tensor) -> Detections:
        parameter = next(self.model.parameters())
        batch = preprocess(images, self.model.config, self.image_size, self.decoder, parameter.device)
        class_outputs, box_outputs = self.model(batch.images.to(parameter.dtype))
        _check_finite([*class_outputs, *box_outputs])
        self._anchors_yxyx = self._anchors_yxyx.to(parameter.device)
        return postprocess_per_class(
            class_outputs, box_outputs, self._anchors_yxyx, self.nms, batch.image_scales
        )


def _check_finite(outputs: Sequence[Tensor]) -> None:
    # One NaN or infinity makes the sum one, and a sum is cheaper than looking at every element.
    sums = torch.stack([output.sum(dtype=torch.float32) for output in outputs])
    if not sums.isfinite().all():
        raise WeightsError(
            "the network's output is not finite (NaN or infinity): the weights are damaged or do not fit "
            "this model, or its precision is too low; convert them again or use float32"
        )
