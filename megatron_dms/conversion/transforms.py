"""Rows of a name table: how tensors of an HF checkpoint become one tensor of a Megatron checkpoint, and back.

A row says one thing, where the rows of each part go along the first axis (`segments`). Joining, splitting and
the slice that one rank needs (hf_weights.py) are derived from it, so a family file states its names and
shapes a single time. All tensors are whole: neither tensor parallelism nor pipeline
stages appear here, because a torch_dist checkpoint holds global tensors.

Shapes: H hidden, F feed-forward, N query heads, G query groups, D head size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_dms.errors import CheckpointError
from megatron_dms.formats.tensor_rows import RowSource, Shape, Span

MEGATRON_LAYERS = "decoder.layers."
HF_LAYERS = "model.layers.{layer}."


class Segment(NamedTuple):
    """Rows [start, stop) of one part."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row(ABC):
    """One Megatron tensor and the HF tensors it is made of.

    megatron: key in the checkpoint; layers share one key and have a leading layer axis of their own.
    hf: names of the parts; "{layer}" in them marks a row that every layer has.
    shapes: shape of each part.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def per_layer(self) -> bool:
        """True if the row stands for one tensor in every layer."""
        return self.megatron.startswith(MEGATRON_LAYERS)

    def layers(self, count: int) -> range:
        """Return the layers, of `count`, that have this row; a row outside the layers has one, "layer" 0."""
        return range(count if self.per_layer else 1)

    def hf_names(self, layer: int) -> tuple[str, ...]:
        """Return the names of the parts in one layer (rows outside the layers do not use `layer`)."""
        return tuple(name.format(layer=layer) for name in self.hf)

    @property
    def megatron_shape(self) -> Shape:
        """The shape of the joined tensor, without the layer axis."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @abstractmethod
    def segments(self) -> Iterator[Segment]:
        """Yield all rows of the parts, in their order within the joined tensor."""

    def segments_within(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield the segments that rows [start, stop) of the joined tensor are made of."""
        position = 0
        for part, first, last in self.segments():
            begin = max(start - position, 0)
            end = min(stop - position, last - first)
            if begin < end:
                yield Segment(part, first + begin, first + end)
            position += last - first


@dataclass(frozen=True)
class Rename(Row):
    """One tensor that has another name in the other checkpoint."""

    def segments(self) -> Iterator[Segment]:
        yield Segment(0, 0, self.shapes[0][0])


@dataclass(frozen=True)
class Vocabulary(Rename):
    """[V, H] of the embedding or the output layer.

    Megatron pads V to a multiple that depends on the tensor-parallel size. HF's rows are stored as they are
    (Megatron reads them into a padded tensor: `allow_shape_mismatch`); what training saved may carry
    padding, which an export leaves out.
    """

    def check_rows(self, count: int) -> None:
        """Raises CheckpointError if a Megatron tensor of `count` rows lacks some of the vocabulary's."""
        rows = self.shapes[0][0]
        if count < rows:
            raise CheckpointError(
                f"{self.megatron} has {count} rows, but config.json says vocab_size {rows}; "
                f"train with --vocab-size {rows} so that no row is lost"
            )


@dataclass(frozen=True)
class Stack(Row):
    """Parts that are stacked along the first axis: linear_fc1 = [gate; up], each [F, H]."""

    def segments(self) -> Iterator[Segment]:
        for part, shape in enumerate(self.shapes):
            yield Segment(part, 0, shape[0])


@dataclass(frozen=True)
class FusedQKV(Row):
    """q [N·D, ...], k and v [G·D, ...] -> linear_qkv [(N + 2G)·D, ...], group after group.

    Within a group: its N/G query heads, then its key head, then its value head. That order lets tensor
    parallelism cut the tensor into equal runs of groups. Weights and biases alike: only the first axis is
    touched.
    """

    groups: int

    def segments(self) -> Iterator[Segment]:
        for group in range(self.groups):
            for part, shape in enumerate(self.shapes):
                rows = shape[0] // self.groups  # of a group: N/G · D queries, D keys, D values
                yield Segment(part, group * rows, (group + 1) * rows)


def joined(row: Row, names: Sequence[str], sources: Sequence[RowSource]) -> list[Span]:
    """Return the Megatron tensor of a row, made of its parts; `sources` holds the tensors of the parts."""
    return [Span(names[part], sources[part], start, stop - start) for part, start, stop in row.segments()]


def part_of(row: Row, wanted: int, name: str, source: RowSource) -> list[Span]:
    """Return part `wanted` of a row, cut out of the Megatron tensor `source`."""
    found, position = [], 0
    for part, start, stop in row.segments():
        if part == wanted:
            found.append((start, Span(name, source, position, stop - start)))
        position += stop - start
    return [span for _, span in sorted(found, key=lambda place: place[0])]
