"""The port backwards: PyTorch weights, fine-tuned ones too, as AutoML variables.

The same rules, each transform inverted. What was folded comes back as its simplest equal: a convolution bias
ahead of a batch norm is zero, the batch norm's mean keeps what it took in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from porting.errors import CheckFailedError, ConversionError
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights.files import check_state_dict
from tf_reference.variables import variable_shapes


def reverse(
    state_dict: Mapping[str, torch.Tensor], config: EfficientDetConfig, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Every model variable of ``config``, in AutoML's names and layout, that makes ``state_dict`` again.

    ``dtype`` is the arrays' type: AutoML keeps ``float32``; ``float64`` loses nothing of weights that are.
    Raises :class:`WeightsError` where ``state_dict`` does not fit ``config``, :class:`ConversionError` for
    weights no AutoML variable can hold: a negative variance, a value too large for ``dtype``.
    """
    with torch.device("meta"):
        check_state_dict(EfficientDet(config), state_dict, "the state dict")
    variables = undo_rules(rules(config), state_dict, dtype)
    expected = variable_shapes(config)
    for name in expected.keys() ^ variables.keys():
        raise CheckFailedError(f"porting/rules.py and {config.name} disagree about {name}; fix the rules")
    for name, shape in expected.items():
        _check(name, variables[name], shape)
    return {name: variables[name] for name in expected}


def undo_rules(
    table: Iterable[Rule], state_dict: Mapping[str, torch.Tensor], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Run every rule backwards.

    A head's bias is a source of several rules, one a level; raises :class:`ConversionError` unless all of
    them give the same value back.
    """
    variables: dict[str, np.ndarray] = {}
    for rule in table:
        tensor = state_dict[rule.target].detach().cpu()
        # bfloat16 and float16 are float32 of fewer digits; NumPy lacks the former.
        array = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
        for name, value in zip(rule.sources, rule.transform.inverse(array, len(rule.sources)), strict=True):
            with np.errstate(over="ignore"):  # _check finds what overflows
                value = np.array(value, dtype, order="C")
            if not np.array_equal(variables.setdefault(name, value), value):
                raise CheckFailedError(
                    f"{rule.target} makes another {name} than a tensor before it; fix porting/rules.py"
                )
    return variables


def with_averages(variables: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """What a released checkpoint holds: each variable, its moving average, and ``global_step``.

    A PyTorch file has one value for both: trained further, AutoML averages on from there.
    """
    content: dict[str, np.ndarray] = {"global_step": np.array(step, np.int64)}
    for name, value in variables.items():
        content[name] = content[name + EMA_SUFFIX] = value
    return content


def _check(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise CheckFailedError(
            f"the rules make {name} of shape {list(value.shape)} where AutoML has {list(shape)}; fix them"
        )
    if not np.isfinite(value).all():
        raise ConversionError(
            f"{name} overflows {value.dtype}, in which AutoML keeps it; the weights are damaged"
        )
    if name.endswith("/moving_variance") and value.min() < 0:
        raise ConversionError(
            f"{name} would hold a negative variance ({value.min():.3g}); the weights are damaged"
        )
