"""Convert a checkpoint with the rules, and account for every variable on both sides."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from porting.checkpoint import Checkpoint
from porting.errors import CheckFailedError, ConversionError
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX, SEGMENTATION_SCOPES, SLOT_SUFFIXES, TRAINING_SCALARS, model_name
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import replacing
from pytorch_model.weights import BATCH_NORM_STATISTICS, MADE_UP
from pytorch_model.weights.catalogue import tensor_specs
from pytorch_model.weights.files import write_weights
from pytorch_model.weights.tensors import AnyTensor, as_tensors, dtype_name, is_finite
from tf_reference.variables import variable_shapes

if TYPE_CHECKING:
    from torch import Tensor

#: Values that a conversion is made of.
EMA, RAW = "EMA", "raw"


@dataclass(frozen=True)
class Coverage:
    """The account of one conversion. It counts every TensorFlow variable and every PyTorch tensor once."""

    used: int  # TensorFlow variables that were converted
    unused: Mapping[str, tuple[str, ...]]  # reason → the variables that were left out for it
    written: int  # PyTorch tensors
    folded: int  # biases that were folded into batch-norm means

    @property
    def unused_count(self) -> int:
        return sum(len(names) for names in self.unused.values())


@dataclass(frozen=True)
class Conversion:
    """``arrays`` fit ``EfficientDet(config)``. ``variables`` are the AutoML values they were made from.

    They share memory where a variable is only stored in another order, and cannot be written to.
    """

    config: EfficientDetConfig
    arrays: dict[str, np.ndarray]  # state-dict key → values
    variables: dict[str, np.ndarray]
    values_kind: str  # "EMA", "raw", or "EMA (705 of 709, the rest raw)"
    coverage: Coverage
    digest: str  # SHA-256 over names, shapes and values of `variables`

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """``arrays`` as PyTorch's tensors, a copy. Imports torch."""
        return as_tensors(self.arrays)


def convert(
    checkpoint: Checkpoint,
    config: EfficientDetConfig,
    raw: bool = False,
    dtype: str = "float32",
    *,
    ema_or_raw: bool = False,
) -> Conversion:
    """Port ``checkpoint`` to the state dict of ``EfficientDet(config)``, without PyTorch and TensorFlow.

    The exponential moving averages are used if the checkpoint has them, unless ``raw``. With ``ema_or_raw``,
    a variable without an average is taken raw, as AutoML's Keras code restores it. ``dtype`` is the type
    of the tensors: ``float32``, or ``float64`` to keep the folded means exact. Raises
    :class:`ConversionError` naming the first missing, unknown or non-finite variable, or the first with a
    wrong shape; raises :class:`CheckpointError` if the file is damaged.
    """
    chosen, unused, values_kind = choose_variables(checkpoint, config, raw, ema_or_raw)
    stored = {name: base for base, name in chosen.items()}
    variables = {stored[name]: value for name, value in checkpoint.read_many(stored)}
    for name in chosen:
        _check_values(name, variables[name])
    table = list(rules(config))
    check_rules(table, variables, config)
    digest = variables_digest(variables)
    arrays = _port_and_share(table, variables, dtype)
    check_targets(arrays, config)
    folded = {rule.sources[1] for rule in table if rule.transform is FOLD_BIAS_INTO_MEAN}
    return Conversion(
        config=config,
        arrays=arrays,
        variables=variables,
        values_kind=values_kind,
        coverage=Coverage(len(variables), unused, len(arrays), len(folded)),
        digest=digest,
    )


def _port_and_share(
    table: Iterable[Rule], variables: dict[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
    """As :func:`port_arrays`, but memory does not grow.

    A variable that is only stored in another order becomes a view of its tensor, and its own memory is free
    again. Nobody may write to what they share.
    """
    arrays = {}
    for rule in table:
        array = arrays[rule.target] = _port(rule, variables, dtype)
        array.flags.writeable = False
        if len(rule.sources) == 1 and array.dtype == variables[rule.sources[0]].dtype:
            (variables[rule.sources[0]],) = rule.transform.inverse(array, 1)
    return arrays


def check_rules(
    table: Iterable[Rule], variables: Mapping[str, np.ndarray], config: EfficientDetConfig
) -> None:
    """Check that every variable is used and every target is written, once each.

    A head's convolution serves all levels, so its bias goes into one batch norm per level; nothing else is
    used twice. Raises :class:`ConversionError` otherwise: a fault in the rules, not in the checkpoint.
    """
    sources, targets = Counter[str](), Counter[str]()
    for rule in table:
        sources.update(rule.sources)
        targets[rule.target] += 1
    for name in sources.keys() - variables.keys():
        raise CheckFailedError(
            f"porting/rules.py uses {name}, which {config.name} does not have; fix that rule"
        )
    for name in variables:
        allowed = len(config.levels) if _SHARED_BIAS.fullmatch(name) else 1
        if sources[name] != allowed:
            raise CheckFailedError(
                f"porting/rules.py uses {name} {sources[name]} times instead of {allowed}; fix that rule"
            )
    for target, count in targets.items():
        if count > 1:
            raise CheckFailedError(f"porting/rules.py writes {target} {count} times; fix that rule")


#: The bias of a head's shared convolution. No batch norm follows class-predict and box-predict.
_SHARED_BIAS = re.compile(r"(class|box)_net/\1-\d+/bias")


def apply_rules(
    table: Iterable[Rule], variables: Mapping[str, np.ndarray], dtype: str = "float32"
) -> dict[str, Tensor]:
    """As :func:`port_arrays`, with PyTorch's tensors, for a network. Imports torch."""
    return as_tensors(port_arrays(table, variables, dtype))


def port_arrays(
    table: Iterable[Rule], variables: Mapping[str, np.ndarray], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Apply every rule. Counters stay int64; everything else becomes ``dtype``."""
    return {rule.target: _port(rule, variables, dtype) for rule in table}


def _port(rule: Rule, variables: Mapping[str, np.ndarray], dtype: str) -> np.ndarray:
    """A new array in C order."""
    with np.errstate(over="ignore"):  # check_targets finds overflows
        array = rule.transform.forward(*(variables[source] for source in rule.sources))
        return np.array(array, array.dtype if array.dtype == np.int64 else np.dtype(dtype), order="C")


def choose_variables(
    checkpoint: Checkpoint, config: EfficientDetConfig, raw: bool, ema_or_raw: bool = False
) -> tuple[dict[str, str], dict[str, tuple[str, ...]], str]:
    """Choose the checkpoint entry for each model variable, and say why every other entry is left out.

    Returns (model variable → entry to read, reason → entries left out, ``values_kind``). Raises
    :class:`ConversionError` unless names and shapes fit the configuration exactly.
    """
    expected = variable_shapes(config)
    averaged = [name for name in checkpoint.shapes if name.endswith(EMA_SUFFIX)]
    use_ema = bool(averaged) and not raw
    chosen = {name: name + EMA_SUFFIX if use_ema else name for name in expected}
    if use_ema and ema_or_raw:
        chosen = {name: twin if twin in checkpoint.shapes else name for name, twin in chosen.items()}
    unused: dict[str, list[str]] = defaultdict(list)
    taken = set(chosen.values())
    for name in checkpoint.shapes:
        if name not in taken:
            unused[_why_unused(name, checkpoint, expected, config)].append(name)
    for name, entry in chosen.items():
        if entry not in checkpoint.shapes:
            raise ConversionError(_missing(name, entry, checkpoint, config, use_ema))
        if checkpoint.shapes[entry] != expected[name]:
            raise ConversionError(_misshapen(entry, expected[name], checkpoint, config))
    return chosen, {why: tuple(names) for why, names in unused.items()}, _values_kind(chosen)


def _values_kind(chosen: Mapping[str, str]) -> str:
    averages = sum(name != entry for name, entry in chosen.items())
    if averages in (0, len(chosen)):
        return EMA if averages else RAW
    return f"{EMA} ({averages} of {len(chosen)}, the rest {RAW})"


def values_sentence(values_kind: str) -> str:
    """The ``values_kind`` of a conversion in a reader's words."""
    if values_kind in (EMA, RAW):
        return "moving averages (EMA)" if values_kind == EMA else "raw values"
    return f"moving averages where the checkpoint has them: {values_kind}"


class ValuesChoice(TypedDict):
    """The options of :func:`convert` that say which values are taken."""

    raw: bool
    ema_or_raw: bool


def how_converted(values_kind: str) -> ValuesChoice:
    """The options of :func:`convert` that give values of this kind again."""
    return {"raw": values_kind == RAW, "ema_or_raw": values_kind not in (EMA, RAW)}


def _why_unused(
    name: str, checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], config: EfficientDetConfig
) -> str:
    """The reason to leave out a checkpoint entry. Raises :class:`ConversionError` if there is none."""
    if name in TRAINING_SCALARS:
        return "training scalar"
    if name.startswith(("backbone/_head/", f"{config.backbone.name}/head/")):
        return "the backbone's own classifier, which a detector does not run"
    if name.startswith(SEGMENTATION_SCOPES):
        return "the segmentation head, which is not ported: the detector does not run it"
    base = model_name(name)
    if base is not None and base in expected:
        if checkpoint.shapes[name] not in (expected[base], ()):
            if name == base:
                raise ConversionError(_misshapen(name, expected[base], checkpoint, config))
            raise ConversionError(
                f"{name} has shape {list(checkpoint.shapes[name])}, but {base} has {list(expected[base])}; "
                "this checkpoint mixes two models"
            )
        if name.endswith(EMA_SUFFIX):
            return "moving average (raw weights were asked for)"
        if name.endswith(SLOT_SUFFIXES):
            return "optimizer slot"
        return "raw value (its moving average is used)"
    raise ConversionError(
        f"{name} is not a variable of {config.name}, so this checkpoint holds something that this port does "
        "not know; check --model and --hparams"
    )


def _misshapen(
    entry: str, needed: tuple[int, ...], checkpoint: Checkpoint, config: EfficientDetConfig
) -> str:
    return (
        f"{entry} in {checkpoint.source} has shape {list(checkpoint.shapes[entry])}, {config.name} needs "
        f"{list(needed)}; check --model and --hparams"
    )


def _missing(name: str, entry: str, checkpoint: Checkpoint, config: EfficientDetConfig, use_ema: bool) -> str:
    if use_ema and name in checkpoint.shapes:
        return (
            f"{name} in {checkpoint.source} has no moving average while other variables do; "
            "--ema-or-raw takes averages where they are and raw values elsewhere, --raw takes only raw values"
        )
    if name + EMA_SUFFIX in checkpoint.shapes:
        return f"{name} in {checkpoint.source} has no raw value, only a moving average; leave out --raw"
    return f"{config.name} needs {entry}, which {checkpoint.source} lacks; check --model and --hparams"


def _check_values(name: str, value: np.ndarray) -> None:
    if not np.issubdtype(value.dtype, np.floating):
        raise ConversionError(
            f"{name} holds {value.dtype}, but weights are floating-point numbers; is it the right checkpoint?"
        )
    if not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        raise ConversionError(
            f"{name} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} of {value.size}; the "
            "training run diverged, use an earlier checkpoint"
        )
    if name.endswith("/moving_variance") and value.size and value.min() < 0:
        raise ConversionError(f"{name} holds a negative variance ({value.min():.3g}); the file is damaged")


def check_targets(state_dict: Mapping[str, AnyTensor], config: EfficientDetConfig) -> None:
    """Check that every tensor of the model is written, with the right shape and finite values.

    Raises :class:`ConversionError` otherwise.
    """
    expected = tensor_specs(config)
    for what, keys in (
        ("leave unwritten", expected.keys() - state_dict.keys()),
        ("write to no tensor called", state_dict.keys() - expected.keys()),
    ):
        if keys:
            raise CheckFailedError(
                f"the rules {what} {min(keys)} ({len(keys)} in all); rules and model disagree"
            )
    for key, tensor in state_dict.items():
        if not is_finite(tensor):
            raise ConversionError(
                f"{key} overflows {dtype_name(tensor)}: its variables hold values too large for a trained "
                "network; the file is damaged"
            )
    for key, spec in expected.items():
        if tuple(state_dict[key].shape) != spec.shape:
            raise CheckFailedError(
                f"the rules make {key} of shape {list(state_dict[key].shape)}, the model needs "
                f"{list(spec.shape)}"
            )


def variables_digest(variables: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over sorted names, shapes and float32 bytes. It identifies the weights in any file format."""
    digest = hashlib.sha256()
    for name in sorted(variables):
        with np.errstate(over="ignore"):  # check_targets finds overflows
            value = np.ascontiguousarray(variables[name], np.float32)
        digest.update(json.dumps([name, list(value.shape)]).encode())
        digest.update(value.data)
    return digest.hexdigest()


def metadata(conversion: Conversion, checkpoint: Checkpoint, assumed: Iterable[str]) -> dict[str, Any]:
    """The origin of the weights, which is stored with them. JSON-serialisable.

    It says so if the batch-norm statistics are made up: training needs to know.
    """
    made_up = {BATCH_NORM_STATISTICS: MADE_UP} if checkpoint.made_up_statistics else {}
    return {
        **made_up,
        "source_format": checkpoint.format,
        "model": conversion.config.name,
        "weights": conversion.values_kind,
        "step": checkpoint.step,
        "variables_sha256": conversion.digest,
        "assumed": list(assumed),
    }


def write_conversion(
    conversion: Conversion, checkpoint: Checkpoint, assumed: Iterable[str], out: Path
) -> None:
    """Write the weights and their :func:`metadata` to ``out``, ``.safetensors`` or ``.pth``.

    The file is written completely or not at all. Raises :class:`OutputError`.
    """
    about = {key: json.dumps(value) for key, value in metadata(conversion, checkpoint, assumed).items()}
    with replacing(out) as temporary:
        write_weights(temporary, conversion.arrays, conversion.config, about)


def read_raw_variables(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, np.ndarray] | None:
    """The values before averaging of a checkpoint converted with its moving averages.

    They help to diagnose a mistake. None if the conversion is of raw values, or the checkpoint lacks some.
    """
    if conversion.values_kind == RAW or not checkpoint.shapes.keys() >= conversion.variables.keys():
        return None
    chosen, _, _ = choose_variables(checkpoint, conversion.config, raw=True)
    return dict(checkpoint.read_many(chosen.values()))
