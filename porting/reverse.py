"""The reverse port: PyTorch weights, also fine-tuned ones, to AutoML variables.

It uses the same rules, with each transform inverted. A folded bias is not restored: a convolution bias before
a batch norm becomes zero, and the batch norm's mean keeps its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from porting.errors import CheckFailedError, ConversionError
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX
from pytorch_model.config import EfficientDetConfig
from pytorch_model.weights.checks import check_weights
from pytorch_model.weights.tensors import AnyTensor, as_array
from tf_reference.variables import variable_shapes


def reverse(
    state_dict: Mapping[str, AnyTensor], config: EfficientDetConfig, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Every model variable of ``config``, in AutoML's names and layout, such that it converts to
    ``state_dict``.

    ``dtype`` is the type of the arrays: AutoML keeps ``float32``; ``float64`` keeps float64 weights exact.
    Raises :class:`WeightsError` if ``state_dict`` does not fit ``config``. Raises :class:`ConversionError`
    for weights that an AutoML variable cannot hold: a negative variance, or a value too large for ``dtype``.
    """
    check_weights(state_dict, config, "the state dict")
    variables = undo_rules(rules(config), state_dict, dtype)
    expected = variable_shapes(config)
    for name in expected.keys() ^ variables.keys():
        raise CheckFailedError(f"porting/rules.py and {config.name} disagree about {name}; fix the rules")
    for name, shape in expected.items():
        _check(name, variables[name], shape)
    return {name: variables[name] for name in expected}


def undo_rules(
    table: Iterable[Rule], state_dict: Mapping[str, AnyTensor], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Apply the inverse of every rule.

    A head's bias is a source of several rules, one per level. Raises :class:`ConversionError` unless all of
    them give the same value.
    """
    variables: dict[str, np.ndarray] = {}
    for rule in table:
        array = as_array(state_dict[rule.target])
        for name, value in zip(rule.sources, rule.transform.inverse(array, len(rule.sources)), strict=True):
            with np.errstate(over="ignore"):  # _check finds overflows
                value = np.array(value, dtype, order="C")
            if not np.array_equal(variables.setdefault(name, value), value):
                raise CheckFailedError(
                    f"{rule.target} makes another {name} than a tensor before it; fix porting/rules.py"
                )
    return variables


def with_averages(variables: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """The content of a released checkpoint: each variable, its moving average, and ``global_step``.

    A PyTorch file has one value for both. When AutoML trains further, it continues the average from there.
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
            f"{name} overflows {value.dtype}, AutoML's type for it; the weights are damaged"
        )
    if name.endswith("/moving_variance") and value.min() < 0:
        raise ConversionError(
            f"{name} would hold a negative variance ({value.min():.3g}); the weights are damaged"
        )
