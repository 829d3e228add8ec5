"""Load the weights of an HF folder into a Megatron model: each rank reads its own slices and no others.

The model itself says which slices a rank needs (`sharded_state_dict`, as for any checkpoint of Megatron's),
so every layout of ranks works. The family's name table says where these slices lie in HF's tensors.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.transforms import Row
from megatron_dms.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor


@torch.no_grad()
def load_hf_weights(sharded_state: Mapping[str, object], rows: list[Row], source: HFFolder) -> None:
    """Fill the tensors of a model's `sharded_state_dict()`, in place; padding of the vocabulary becomes 0.

    Raises CheckpointError if the model has a tensor that the name table lacks, or of another shape.
    """
    by_key = {row.megatron: row for row in rows}
    for leaf in sharded_tensors(sharded_state.values()):
        row = by_key.get(leaf.key)
        if row is None:
            raise CheckpointError(f"{source.path} holds nothing for the model's {leaf.key}")
        _fill(leaf, row, source)


def sharded_tensors(values: Iterable[object]) -> Iterator["ShardedTensor"]:
    """Yield every sharded tensor below `values`; a factory (gate and up in one) gives views of its parts."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value  # what is left are the layers' extra states, which hold nothing


def _fill(leaf: "ShardedTensor", row: Row, source: HFFolder) -> None:
    axes = leaf.prepend_axis_num  # 1 for a layer's tensor: the number of the layer
    layer = leaf.global_offset[0] if axes else 0
    offsets, shape = leaf.global_offset[axes:], tuple(leaf.global_shape[axes:])
    padded = leaf.allow_shape_mismatch and shape[0] >= row.megatron_shape[0]
    if shape[1:] != row.megatron_shape[1:] or not (padded or shape == row.megatron_shape):
        raise CheckpointError(
            f"{source.path}: the model's {leaf.key} has shape {shape}, expected {row.megatron_shape}"
        )
    columns = [
        slice(begin, begin + size) for begin, size in zip(offsets[1:], leaf.local_shape[1:], strict=True)
    ]
    names, filled = row.hf_names(layer), 0
    for part, start, stop in row.segments_within(offsets[0], offsets[0] + leaf.local_shape[0]):
        piece: Tensor = source.read_slice(names[part], (slice(start, stop), *columns))
        leaf.data[filled : filled + stop - start].copy_(piece)
        filled += stop - start
    leaf.data[filled:].zero_()
