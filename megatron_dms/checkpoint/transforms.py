"""Rows of a name table: how tensors of an HF checkpoint become one tensor of a Megatron checkpoint, and back.

A row is written once, for the direction HF -> Megatron (`join`); the way back (`split`) belongs to the same
row, so a family file states its names and shapes a single time. All tensors are whole: neither tensor
parallelism nor pipeline stages appear here, because a torch_dist checkpoint holds global tensors.

Shapes: H hidden, F feed-forward, N query heads, G query groups, D head size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dms.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]
MEGATRON_LAYERS = "decoder.layers."
HF_LAYERS = "model.layers.{layer}."


@dataclass(frozen=True)
class Row(ABC):
    """One Megatron tensor and the HF tensors it is made of.

    megatron: key in the checkpoint; layers share one key and have a leading layer axis of their own.
    hf: names of the parts in the order `join` takes them; "{layer}" in them marks a row that every layer has.
    shapes: shape of each part.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def per_layer(self) -> bool:
        """True if the row stands for one tensor in every layer."""
        return self.megatron.startswith(MEGATRON_LAYERS)

    def hf_names(self, layer: int) -> tuple[str, ...]:
        """Names of the parts in one layer (`layer` is not used by rows outside the layers)."""
        return tuple(name.format(layer=layer) for name in self.hf)

    @property
    @abstractmethod
    def megatron_shape(self) -> Shape:
        """Shape of the joined tensor, without the layer axis."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """HF parts -> Megatron tensor."""

    @abstractmethod
    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Megatron tensor -> HF parts: the inverse of `join`, bit for bit."""


@dataclass(frozen=True)
class Rename(Row):
    """The same tensor under another name."""

    @property
    def megatron_shape(self) -> Shape:
        return self.shapes[0]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (tensor,) = parts
        return tensor

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class Vocabulary(Rename):
    """[V, H] of the embedding or the output layer.

    Megatron pads V to a multiple that depends on the tensor-parallel size. HF's rows are stored as they are
    (Megatron reads them into a padded tensor: `allow_shape_mismatch`); what training saved may carry
    padding, cut off here.
    """

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = self.shapes[0][0]
        if tensor.shape[0] < rows:
            raise CheckpointError(
                f"{self.megatron} has {tensor.shape[0]} rows, but config.json says vocab_size {rows}; "
                f"train with --vocab-size {rows} so that no row is lost"
            )
        return (tensor[:rows],)


@dataclass(frozen=True)
class Stack(Row):
    """Parts one below the other: linear_fc1 = [gate; up], each [F, H]."""

    @property
    def megatron_shape(self) -> Shape:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.split(tensor, [shape[0] for shape in self.shapes]))


@dataclass(frozen=True)
class FusedQKV(Row):
    """q [N·D, ...], k and v [G·D, ...] -> linear_qkv [(N + 2G)·D, ...], group after group.

    Within a group: its N/G query heads, then its key head, then its value head. That order lets tensor
    parallelism cut the tensor into equal runs of groups. Weights and biases alike: only the first axis is
    touched.
    """

    groups: int
    head_size: int

    @property
    def megatron_shape(self) -> Shape:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def _grouped(self, part: Tensor) -> Tensor:
        """[heads·D, ...] -> [G, heads/G, D, ...]"""
        return part.reshape(self.groups, -1, self.head_size, *part.shape[1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._grouped(part) for part in parts], dim=1).reshape(self.megatron_shape)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        heads = [shape[0] // (self.groups * self.head_size) for shape in self.shapes]  # per group: N/G, 1, 1
        parts = torch.split(self._grouped(tensor), heads, dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))
