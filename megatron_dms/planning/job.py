"""What is planned: a retrofit (recipe, model, context, batch), and a layout of ranks to run it in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_dms.planning.models import ModelSize

RECOMPUTE = ("none", "selective", "full")
"""Megatron's --recompute-granularity; selective: core attention, full: each layer (uniform, 1 layer)."""
ELEMENT = 2
"""Bytes of a bf16 number."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and against which teacher.

    trains_all: all weights, else the predictor alone with the base frozen. linear: the linear predictor (else
    a borrowed channel, which has no parameters). own_teacher: a second, frozen model of the same size.
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
class Setting:
    """One retrofit. context in tokens, batch in samples (global); logits_bytes: of one logit.

    Raises:
        ValueError: on construction, naming what was found and what was expected.
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
class Layout:
    """TP x PP x CP x DP ranks. sp: sequence parallelism; micro: samples of a microbatch."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False
    micro: int = 1
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def microbatches(self, setting: Setting) -> int:
        """Of one step on each pipeline."""
        return setting.batch // (self.dp * self.micro)

    def tokens(self, setting: Setting) -> int:
        """n: tokens of a microbatch on one rank of the context-parallel group."""
        return self.micro * setting.context // self.cp

    def in_flight(self, setting: Setting, stage: int) -> int:
        """Microbatches whose activations a stage (0 = first) holds at once, under 1F1B."""
        return min(self.microbatches(setting), self.pp - stage)

    def kv_copies(self, model: ModelSize) -> int:
        """Context-parallel ranks that share a KV head in attention (mcore/context_parallel.py)."""
        return max(self.cp // (model.groups // self.tp), 1)

    def __str__(self) -> str:
        parallel = f"TP {self.tp} x PP {self.pp} x CP {self.cp} x DP {self.dp}"
        return f"{parallel}{', SP' if self.sp else ''}, micro batch {self.micro}, recompute {self.recompute}"


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def refusal(setting: Setting, layout: Layout) -> str | None:
    """Why Megatron or pretrain_dms.py cannot run a layout, whatever its memory; None: it can."""
    model = setting.model
    divided = {
        "query heads": (model.heads, layout.tp),
        "KV heads": (model.groups, layout.tp),
        "MLP channels": (model.ffn, layout.tp),
        "layers": (model.layers, layout.pp),
        "samples of the batch": (setting.batch, layout.dp * layout.micro),
        # two parts of the sequence for each rank: the causal triangle is then cut into equal shares
        "tokens of context": (setting.context, 2 * layout.cp if layout.cp > 1 else 1),
    }
    for what, (number, by) in divided.items():
        if number % by:
            return f"{number} {what} are not divisible by {by}"
    heads, groups = model.heads // layout.tp, model.groups // layout.tp
    if heads % layout.cp or (groups % layout.cp and layout.cp % groups):
        return f"{heads} query and {groups} KV heads of a TP rank cannot be shared out among CP {layout.cp}"
    if layout.sp and layout.tp == 1:
        return "sequence parallelism needs TP above 1"
    part = setting.context // layout.cp
    if layout.sp and part % layout.tp:  # it cuts each sample's sequence
        return f"{part} tokens of context on each rank are not divisible by TP {layout.tp}"
    return None


def layouts(setting: Setting, ranks: int) -> Iterator[Layout]:
    """Every layout of so many ranks that can run, in a fixed order; memory is not looked at."""
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            for cp in divisors(ranks // (tp * pp)):
                base = Layout(tp, pp, cp, ranks // (tp * pp * cp))
                if refusal(setting, base):
                    continue
                for micro in divisors(setting.batch // base.dp):
                    for sp in (False, True):
                        sized = replace(base, micro=micro, sp=sp)
                        if refusal(setting, sized) is None:
                            yield from (replace(sized, recompute=name) for name in RECOMPUTE)
