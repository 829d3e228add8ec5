"""Back-ends of DMS attention for training, by name.

All compute `megatron_dms.ops.attention.dms_attention`, with which the tests compare outputs and gradients.

| name | memory | cost | runs on |
|---|---|---|---|
| dense | T * T | T * T | anything: the reference |
| flash | T | the causal triangle | CUDA (bf16, fp16), CPU |
| flex | T | the causal triangle | CUDA (CPU: forward only) |
| triton | T | the window, and the keys that survive | CUDA (elsewhere in Triton's interpreter) |
"""

import functools
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

AttentionBackend = Callable[..., Tensor]
"""(q, k, v, log_keep, window, scale) -> output, as in ops.attention."""

BACKENDS = {
    "dense": ("megatron_dms.ops.attention", "dms_attention"),
    "flash": ("megatron_dms.kernels.flash_attention", "flash_attention"),
    "flex": ("megatron_dms.kernels.flex_attention", "flex_attention"),
    "triton": ("megatron_dms.kernels.triton_attention", "triton_attention"),
}


def backend_name(name: str, device: torch.device | str) -> str:
    """What "auto" stands for: "triton" on CUDA, "dense" elsewhere. Other names are returned as given."""
    if name != "auto":
        return name
    return "triton" if torch.device(device).type == "cuda" else "dense"


@functools.cache
def attention_backend(name: str, **options: float) -> AttentionBackend:
    """The back-end of that name, with its own options set (triton: `threshold`).

    Only the module of this back-end is imported.

    Raises:
        ValueError: there is no back-end of that name; no other one is taken in its place.
        ImportError: a library that the back-end needs (triton) is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention back-end is {name!r}, expected one of {sorted(BACKENDS)}")
    module, function = BACKENDS[name]
    found = getattr(import_module(module), function)
    return functools.partial(found, **options) if options else found
