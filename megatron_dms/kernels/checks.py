"""What every back-end checks before it launches a kernel."""

import torch
from torch import Tensor

ROW_BYTES = 16
"""GPUs load rows in words of this many bytes, if rows begin at multiples of it."""


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int) -> None:
    """Check that shapes are those of ops.attention, and that all inputs have one type and one device.

    Raises:
        ValueError: the message names what was found and what was expected.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"expected q [B,H,T,D] and k [B,G,T,D], found {tuple(q.shape)} and {tuple(k.shape)}")
    B, H, T, D = q.shape
    G = k.shape[1]
    if k.shape != (B, G, T, D) or v.shape != k.shape or log_keep.shape != (B, G, T) or not G or H % G:
        raise ValueError(
            f"expected q [B,H,T,D], k and v [B,G,T,D], log_keep [B,G,T] with H a multiple of G, found "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_keep {tuple(log_keep.shape)}"
        )
    if 0 in q.shape:
        raise ValueError(f"q {tuple(q.shape)} is empty")
    if window < 0:
        raise ValueError(f"window is {window}, expected >= 0")
    if not q.dtype == k.dtype == v.dtype or log_keep.dtype != torch.float32:
        raise ValueError(
            f"expected q, k and v of one type and log_keep in fp32, found {q.dtype}, {k.dtype}, {v.dtype} "
            f"and {log_keep.dtype}"
        )
    if len({x.device for x in (q, k, v, log_keep)}) > 1:
        raise ValueError(
            f"expected all on one device, found q on {q.device}, k on {k.device}, v on {v.device}, log_keep "
            f"on {log_keep.device}"
        )


def with_wide_rows(x: Tensor) -> Tensor:
    """`x` itself if its channels are contiguous and its rows can be loaded in whole words; else a copy."""
    size = x.element_size()
    starts = (x.data_ptr(), *(stride * size for stride in x.stride()[:-1]))
    aligned = all(start % ROW_BYTES == 0 for start in starts)
    never = x.shape[-1] * size % ROW_BYTES != 0
    return x if x.stride(-1) == 1 and (aligned or never) else x.clone(memory_format=torch.contiguous_format)
