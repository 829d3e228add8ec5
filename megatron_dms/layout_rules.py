"""What must divide what, so that a model and a batch can be laid out over ranks. Imports nothing heavy.

Each rule is stated here once. Whoever asks words the message: a flag at the start of a run, a finding of the
preflight, a layout that the planner skips, a line of the parity card.

TP, PP, CP, DP: sizes of tensor, pipeline, context and data parallelism.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Division(NamedTuple):
    """One number that must be a multiple of another one."""

    what: str
    number: int
    by: int

    @property
    def exact(self) -> bool:
        """Whether nothing is left over."""
        return self.number % self.by == 0


def first_inexact(divisions: Iterable[Division]) -> Division | None:
    """The first division that leaves a remainder; None if all of them are exact."""
    return next((division for division in divisions if not division.exact), None)


def model_divisions(heads: int, groups: int, ffn: int, layers: int, tp: int, pp: int) -> list[Division]:
    """A tensor-parallel rank gets whole heads and an equal share of the MLP, a stage gets whole layers."""
    return [
        Division("query heads", heads, tp),
        Division("KV heads", groups, tp),
        Division("MLP channels", ffn, tp),
        Division("layers", layers, pp),
    ]


def heads_can_be_shared(heads: int, groups: int, cp: int) -> bool:
    """Whether CP ranks can share out the heads of one tensor-parallel rank (mcore/context_parallel.py).

    Query heads are divided. KV heads are divided, or each of them goes to equally many ranks.
    """
    return heads % cp == 0 and (groups % cp == 0 or cp % groups == 0)


def sequence_parts(cp: int) -> int:
    """The number of equal parts that a sequence is cut into: two for each context-parallel rank.

    A rank gets an early part and a late one, so that the causal triangle is shared out in equal areas.
    """
    return 2 * cp if cp > 1 else 1


def sequence_parallel_multiple(tp: int, cp: int) -> int:
    """Under sequence parallelism TP cuts what each context-parallel rank has of a sample once more."""
    return tp * cp


def data_parallel_size(world: int, tp: int, pp: int, cp: int) -> int | None:
    """DP of so many processes; None if they are not a multiple of TP x PP x CP, or a size is below 1."""
    one = tp * pp * cp
    return world // one if min(tp, pp, cp) > 0 and world % one == 0 else None


def batch_multiple(micro: int, dp: int) -> int:
    """The global batch is a multiple of this number of samples: one microbatch on each data-parallel rank."""
    return micro * dp


def fills_virtual_stages(microbatches: int, group: int, pp: int) -> bool:
    """Whether Megatron's interleaved schedule (0.19.2) can run so many microbatches in groups of `group`.

    The schedule takes one group through a virtual stage before the next; the last group may be smaller, but
    it has at least PP microbatches.
    """
    return microbatches >= group and not 0 < microbatches % group < pp
