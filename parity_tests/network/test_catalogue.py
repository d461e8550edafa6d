"""The catalogue of tensors, which conversion and export read, is the network's own list of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from parity_tests.helpers.configs import configs
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights.catalogue import Spec, tensor_specs


def check_catalogue(config: EfficientDetConfig) -> None:
    """Same keys in the same order, same shapes and dtypes, and the same tensors are trained."""
    with torch.device("meta"):
        network = EfficientDet(config)
    trained = {key for key, _ in network.named_parameters()}
    own = {
        key: Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), key in trained)
        for key, tensor in network.state_dict().items()
    }
    assert list(tensor_specs(config).items()) == list(own.items())


@pytest.mark.parametrize("model", MODELS)
def test_every_variant(model: str) -> None:
    check_catalogue(model_config(model))


@settings(deadline=None, max_examples=60)
@given(configs())
def test_any_configuration(config: EfficientDetConfig) -> None:
    check_catalogue(config)
