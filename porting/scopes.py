"""What the suffixes and stray names of an AutoML checkpoint mean."""

from __future__ import annotations

EMA_SUFFIX = "/ExponentialMovingAverage"
MOMENTUM_SUFFIX = "/Momentum"

#: Optimizer slots: suffixes TensorFlow's optimizers add to a trainable variable's name.
SLOT_SUFFIXES = (MOMENTUM_SUFFIX, "/Adam", "/Adam_1", "/RMSProp", "/RMSProp_1", "/Adagrad")

#: The two variables of a batch norm that training updates without gradients.
STATISTICS = ("/moving_mean", "/moving_variance")

#: Scalars of the training loop, no part of the model: Adam's, those of mixed precision's loss scale, and the
#: mean number of positives that ``positives_momentum`` keeps (AutoML ``det_model_fn.py``).
TRAINING_SCALARS = frozenset(
    {
        *("global_step", "learning_rate", "beta1_power", "beta2_power"),
        *("current_loss_scale", "good_steps", "moving_normalizer"),
    }
)


def model_name(name: str) -> str | None:
    """The model variable that a checkpoint entry belongs to; None for training's own scalars."""
    if name in TRAINING_SCALARS:
        return None
    for suffix in (EMA_SUFFIX, *SLOT_SUFFIXES):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name
