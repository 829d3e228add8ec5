"""The parity card: does a Megatron checkpoint hold the model that an HF folder holds? Tensors bit for bit,
logits of two implementations at several layouts of ranks.

    verify(hf_dir, megatron_dir)    -> ParityCard, written as JSON and as a table
"""

from megatron_dms.conversion.parity.verify import LAYOUTS, verify

__all__ = ["LAYOUTS", "verify"]
