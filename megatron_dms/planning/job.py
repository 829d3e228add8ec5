"""What is planned: a retrofit job (recipe, model, context, batch), and the layout of ranks that runs it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_dms.layout_rules import (
    Division,
    batch_multiple,
    first_inexact,
    heads_can_be_shared,
    model_divisions,
    sequence_parallel_multiple,
    sequence_parts,
)
from megatron_dms.planning.models import ModelSize

RECOMPUTE = ("none", "selective", "full")
"""Values of Megatron's --recompute-granularity. selective: core attention; full: every layer (uniform, 1)."""
ELEMENT = 2
"""Bytes of a bf16 number."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and against which teacher.

    trains_all: train all weights; otherwise train the predictor alone and freeze the base. linear: use the
    linear predictor; otherwise use a borrowed channel, which has no parameters. own_teacher: the teacher is
    a second, frozen model of the same size.
    """

    name: str
    trains_all: bool
    linear: bool
    own_teacher: bool


RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe("paper", trains_all=True, linear=False, own_teacher=True),
    "adapter": Recipe("adapter", trains_all=False, linear=True, own_teacher=False),
}
"""paper: --dms-train all, --dms-teacher DIR. adapter: --dms-predictor linear --dms-train predictor
--dms-teacher self."""


@dataclass(frozen=True)
class Job:
    """One retrofit. context: tokens. batch: samples of the global batch. logits_bytes: bytes of one logit.

    Raises:
        ValueError: on construction; it names what was found and what was expected.
    """

    model: ModelSize
    recipe: Recipe
    context: int
    batch: int
    fuse_output_layer: bool = False
    distributed_optimizer: bool = True
    logits_bytes: int = ELEMENT

    def __post_init__(self) -> None:
        if not 0 < self.context <= self.model.positions:
            raise ValueError(
                f"--context is {self.context}, expected 1 to {self.model.positions}, the positions of "
                f"{self.model.name}"
            )
        if self.batch < 1:
            raise ValueError(f"--batch is {self.batch}, expected 1 or more")


@dataclass(frozen=True)
class RankLayout:
    """A layout of TP x PP x CP x DP ranks. sp: sequence parallelism; micro: samples of a microbatch."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False
    micro: int = 1
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def microbatches(self, job: Job) -> int:
        """Return the number of microbatches of one step on each pipeline."""
        return job.batch // (self.dp * self.micro)

    def tokens(self, job: Job) -> int:
        """Return n, the tokens of a microbatch on one rank of the context-parallel group."""
        return self.micro * job.context // self.cp

    def in_flight(self, job: Job, stage: int) -> int:
        """Return how many microbatches' activations a stage (0 = first) holds at once, under 1F1B."""
        return min(self.microbatches(job), self.pp - stage)

    def kv_copies(self, model: ModelSize) -> int:
        """Return the number of context-parallel ranks that share a KV head (mcore/context_parallel.py)."""
        return max(self.cp // (model.groups // self.tp), 1)

    def __str__(self) -> str:
        parallel = f"TP {self.tp} x PP {self.pp} x CP {self.cp} x DP {self.dp}"
        return f"{parallel}{', SP' if self.sp else ''}, micro batch {self.micro}, recompute {self.recompute}"


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def refusal(job: Job, layout: RankLayout) -> str | None:
    """Return why Megatron or pretrain_dms.py cannot run a layout, whatever its memory; None if it can."""
    model = job.model
    divisions = model_divisions(model.heads, model.groups, model.ffn, model.layers, layout.tp, layout.pp)
    divisions += [
        Division("samples of the batch", job.batch, batch_multiple(layout.micro, layout.dp)),
        Division("tokens of context", job.context, sequence_parts(layout.cp)),
    ]
    if wrong := first_inexact(divisions):
        return f"{wrong.number} {wrong.what} are not divisible by {wrong.by}"
    heads, groups = model.heads // layout.tp, model.groups // layout.tp
    if not heads_can_be_shared(heads, groups, layout.cp):
        return f"{heads} query and {groups} KV heads of a TP rank cannot be shared out among CP {layout.cp}"
    if layout.sp and layout.tp == 1:
        return "sequence parallelism needs TP above 1"
    if layout.sp and job.context % sequence_parallel_multiple(layout.tp, layout.cp):
        part = job.context // layout.cp
        return f"{part} tokens of context on each rank are not divisible by TP {layout.tp}"
    return None


def layouts(job: Job, ranks: int) -> Iterator[RankLayout]:
    """Yield every layout of so many ranks that can run, in a fixed order. Memory is not considered."""
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            for cp in divisors(ranks // (tp * pp)):
                base = RankLayout(tp, pp, cp, ranks // (tp * pp * cp))
                if refusal(job, base):
                    continue
                for micro in divisors(job.batch // base.dp):
                    for sp in (False, True):
                        sized = replace(base, micro=micro, sp=sp)
                        if refusal(job, sized) is None:
                            yield from (replace(sized, recompute=name) for name in RECOMPUTE)
