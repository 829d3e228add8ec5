"""What every layer must know about the microbatch that it works on.

Megatron hands `packed_seq_params` unchanged to each attention layer, and recomputation closes over it. So the
sample ids, the phase and the compression account of a microbatch travel in a subclass of PackedSeqParams. No
global is written in a forward pass, and a recomputed layer sees exactly what it saw the first time, whichever
microbatch the pipeline has reached by then.
"""

from dataclasses import dataclass
from enum import Enum

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dms.mcore.compression_account import CompressionAccount


class Phase(Enum):
    """How eviction logits become decisions."""

    ZEROING = "zeroing"  # no decisions yet: the borrowed channel still takes part in attention, and fades out
    SOFT = "soft"  # training: noisy, relaxed decisions
    HARD = "hard"  # evaluation: alpha = 1[z > 0]


@dataclass(kw_only=True)
class Microbatch(PackedSeqParams):
    """One microbatch of B samples of T tokens each: whole sequences, also under context parallelism. It is
    not packed (`qkv_format` is never 'thd').

    Raises:
        ValueError: an account in the zeroing phase, or none in another phase.
    """

    sample_ids: Tensor
    """[B] int64, global sample numbers. The noise depends on them, and not on ranks."""
    valid: Tensor
    """[B, T] bool, False on padding."""
    phase: Phase
    seed: int
    """The seed of the decision noise."""
    fade: float = 0.0
    """The factor on the borrowed channel. It is above 0 in the zeroing phase only."""
    account: CompressionAccount | None = None
    """The account to which layers report their decisions; None in the zeroing phase, which makes none."""

    def __post_init__(self) -> None:
        if (self.account is None) != (self.phase is Phase.ZEROING):
            raise ValueError(f"account is {type(self.account).__name__} in phase {self.phase.value}")
        self.qkv_format = "sbhd"
        # Megatron takes the length of the rotary table from these two, before it cuts the table by context
        # rank.
        self.max_seqlen_q = self.max_seqlen_kv = self.valid.shape[1]
