"""The part of the network between two neighbouring taps: its modules, its rules and its right tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from porting.convert import apply_rules
from porting.rules import Rule, TapPair, rules
from pytorch_model.efficientdet import EfficientDet


def segment(pair: TapPair) -> tuple[str, ...]:
    """Paths of the modules that compute this tap from the taps before it.

    ``a.b`` covers the module and all below it, ``a.b.`` the module only.
    """
    module = pair.module
    parts = module.split(".")
    if pair.output is not None:  # class_net, box_net: from the last batch norm to the output
        return (f"{module}.predict", f"{module}.")
    if parts[1:2] == ["bns"]:
        return (module, f"{parts[0]}.convs.{parts[2]}", f"{parts[0]}.")
    if module.startswith("backbone.blocks.") and len(parts) == 3:
        return (f"{module}.",)  # the block's addition only; its parts have their own taps
    if module.startswith("bifpn.") and len(parts) == 5:
        return (f"{module}.", f"{module}.act", f"{module}.conv", f"{module}.bn")
    return (module,)


def modules_of(model: EfficientDet, pair: TapPair) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module of this layer."""
    paths = segment(pair)
    for name, module in model.named_modules():
        if any(name == s.rstrip(".") or (name.startswith(s + ".") and not s.endswith(".")) for s in paths):
            yield name, module


def rules_of(model: EfficientDet, pair: TapPair) -> list[Rule]:
    """The rules that make this layer's tensors."""
    prefixes = tuple(f"{s}." for s in segment(pair) if not s.endswith("."))
    return [rule for rule in rules(model.config) if rule.target.startswith(prefixes) and rule.sources]


def expected_tensors(
    model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair
) -> dict[str, Tensor]:
    """State-dict key → tensor as the rules make it, in the model's type, for all tensors of this layer."""
    tensors = apply_rules(rules_of(model, pair), variables, "float64")
    state = model.state_dict()
    return {key: value.to(state[key]) for key, value in tensors.items()}
