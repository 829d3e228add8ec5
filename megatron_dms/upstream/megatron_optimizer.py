"""Get the optimizer of a run; Megatron offers no way to."""

from typing import Any


def optimizer_of(config: Any) -> Any:
    """Megatron's optimizer of the training run under way.

    Megatron's training loop leaves one bound method of the optimizer, `scale_loss`, in the model's
    configuration before the first training step.

    Args:
        config: the model's TransformerConfig.

    Returns:
        The MegatronOptimizer.
    """
    return config.grad_scale_func.__self__
