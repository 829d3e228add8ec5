"""What every layer must know of the microbatch that it works on.

Megatron hands `packed_seq_params` unchanged to each attention layer, and recomputation closes over it. So a
microbatch's ids, its phase and its compression account travel in a subclass of it: nothing global is written
in a forward pass, and a recomputed layer sees exactly what it saw the first time, whichever microbatch the
pipeline has reached by then.
"""

from dataclasses import dataclass
from enum import Enum

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dms.mcore.compression_account import CompressionAccount


class Phase(Enum):
    """What becomes of the eviction logits."""

    ZEROING = "zeroing"  # not used yet: the borrowed channel still takes part in attention, fading out
    SOFT = "soft"  # training: noisy, relaxed decisions
    HARD = "hard"  # evaluation: alpha = 1[z > 0]


@dataclass(kw_only=True)
class Microbatch(PackedSeqParams):
    """One microbatch of B samples, T tokens each: whole sequences, under context parallelism too. It is not
    packed (`qkv_format` is never 'thd')."""

    sample_ids: Tensor
    """[B] int64, global sample numbers: the noise depends on them, not on ranks."""
    valid: Tensor
    """[B, T] bool, False on padding."""
    phase: Phase
    seed: int
    """Seed of the decision noise."""
    fade: float = 0.0
    """Factor on the borrowed channel: above 0 in the zeroing phase only."""
    account: CompressionAccount | None = None
    """Where layers report their decisions; None in the zeroing phase."""

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        # Megatron takes the length of the rotary table from these two, before it cuts it by context rank.
        self.max_seqlen_q = self.max_seqlen_kv = self.valid.shape[1]
