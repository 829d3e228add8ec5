"""Bytes per rank, by category.

Activations are counted as by Korthikanti et al. 2022 (arXiv 2205.05198): what each operator keeps for its
backward pass. Their layer has GELU, multi-head attention with its score matrix, and dropout. The layer here
has RMSNorm, grouped queries, an attention that keeps its output and one number for each row, gated SiLU, no
dropout, and the tensors of DMS. A linear layer whose weight is frozen does not keep its input.
"""

from dataclasses import dataclass, fields

from megatron_dms.planning.job import ELEMENT, Job, RankLayout

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes per parameter: bf16; the fp32 gradient buffer of Megatron's DDP; fp32 master weight, two moments."""
DECISIONS = 4
"""fp32 numbers that eviction keeps for a pair: noisy logit, alpha, log(1 - alpha), the latter shifted."""
CHUNKS, MIN_CHUNK = 64, 128
"""kernels/linear_kl.py cuts the tokens of a microbatch into CHUNKS chunks of MIN_CHUNK tokens or more."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank by category, in bytes."""

    weights: float
    teacher: float
    gradients: float
    optimizer: float
    activations: float
    """What is kept for the backward passes of all microbatches in flight."""
    logits: float
    """Logits of student and teacher on the last stage; with a fused output layer, what takes their place."""
    working: float
    """What exists while a layer's backward pass runs; with full recompute also the layer's activations."""
    overhead: float

    @property
    def total(self) -> float:
        """Bytes of all categories."""
        return sum(getattr(self, item.name) for item in fields(self))


def layer_tensors(job: Job, layout: RankLayout) -> dict[str, float]:
    """Return the bytes that one layer keeps of one microbatch without recompute, by tensor.

    Names that begin with "core: " are made again under selective recompute.
    """
    model, recipe = job.model, job.recipe
    n, t = layout.tokens(job), layout.tp
    # The residual stream and the norms see a part of the tokens under SP, and all of them without it.
    stream = ELEMENT * model.hidden * (n / t if layout.sp else n)
    heads = ELEMENT * n / t
    kept = {
        "layer input": stream,
        "queries, keys": heads * (model.q + model.kv),
        "values with their logit": heads * (model.kv + model.groups),
        "core: log-sum-exp": 4 * model.heads * n / t,
        "core: decisions": 4 * DECISIONS * model.groups * layout.kv_copies(model) * n / t,
        "residual after attention": stream,
        "gate and up": heads * 2 * model.ffn,
    }
    if model.qk_norm:  # a view of the projection's output for the keys, a copy for the queries
        kept["QKV before the norms"] = heads * (model.q + 2 * model.kv)
        kept["queries before their norm"] = heads * model.q
    if recipe.linear:
        kept["predictor input"] = stream
    copies = layout.kv_copies(model) - 1
    kept["core: further copies of keys and values"] = copies * heads * (2 * model.kv + model.groups)
    # A flash kernel reads its output again; so does a trained output projection, in the same storage.
    kept["attention output" if recipe.trains_all else "core: attention output"] = heads * model.q
    if recipe.trains_all:
        if layout.cp > 1:  # the projection reads what came back, the kernel what it sent
            kept["core: attention output before its exchange"] = heads * model.q
        kept |= {"QKV input": stream, "MLP input": stream, "MLP product": heads * model.ffn}
    return kept


def kept_by_layer(job: Job, layout: RankLayout, recompute: str | None = None) -> float:
    """Return the bytes that one layer keeps of one microbatch. recompute: None means the layout's."""
    tensors = layer_tensors(job, layout)
    match recompute or layout.recompute:
        case "none":
            return sum(tensors.values())
        case "selective":
            return sum(size for name, size in tensors.items() if not name.startswith("core: "))
        case "full":
            return tensors["layer input"]
        case other:
            raise ValueError(f"recompute is {other!r}, expected none, selective or full")


def _activations(job: Job, layout: RankLayout, stage: int) -> float:
    """Return the bytes that all layers of a stage keep for all microbatches in flight.

    Later stages also keep the teacher's hidden states, which arrive in one tensor with the student's
    (training/teacher.py); the last stage keeps the input of the final norm.
    """
    stream = layer_tensors(job, layout)["layer input"]
    each = job.model.layers // layout.pp * kept_by_layer(job, layout)
    if stage > 0:
        each += stream
    if stage == layout.pp - 1:
        each += stream * (2 if job.recipe.trains_all else 1)  # the final norm's input, the output layer's
    return layout.in_flight(job, stage) * each


def _logits(job: Job, layout: RankLayout) -> float:
    """Return the bytes of the logits of one microbatch: two tensors, as gradients overwrite the teacher's."""
    model, n = job.model, layout.tokens(job)
    columns = model.padded_vocab(layout.tp) / layout.tp
    row = columns * job.logits_bytes
    if not job.fuse_output_layer:
        return 2 * n * row
    hidden_states = 3 * ELEMENT * n * model.hidden  # student's, teacher's, the student's gradient: all tokens
    # the output weight's gradient, summed in fp32 and then rounded
    gradient = (4 + ELEMENT) * columns * model.hidden if job.recipe.trains_all else 0
    return 2 * min(n, max(MIN_CHUNK, -(-n // CHUNKS))) * row + hidden_states + gradient


def _working(job: Job, layout: RankLayout) -> float:
    """Return the bytes of the gradients of gate, up and their product, and of an input and its gradient."""
    model, n = job.model, layout.tokens(job)
    size = ELEMENT * n * (3 * model.ffn / layout.tp + 2 * model.hidden)
    return size + (kept_by_layer(job, layout, "none") if layout.recompute == "full" else 0)


def stage_memory(job: Job, layout: RankLayout, stage: int, overhead: float) -> Memory:
    """Return the memory of a rank of one pipeline stage (0 = first) at its peak; overhead is in bytes."""
    model, recipe, (t, p) = job.model, job.recipe, (layout.tp, layout.pp)
    own = model.stage_parameters(t, p, stage, recipe.linear)
    plain = model.stage_parameters(t, p, stage)
    trained = own if recipe.trains_all else own - plain
    shards = layout.dp * layout.cp if job.distributed_optimizer else 1
    return Memory(
        weights=WEIGHT * own,
        teacher=WEIGHT * plain if recipe.own_teacher else 0,
        gradients=GRADIENT * trained,
        optimizer=OPTIMIZER * trained / shards,
        activations=_activations(job, layout, stage),
        logits=_logits(job, layout) if stage == p - 1 else 0,
        working=_working(job, layout),
        overhead=overhead,
    )


def peak_memory(job: Job, layout: RankLayout, overhead: float) -> tuple[int, Memory]:
    """Return the fullest stage and its memory.

    From the second stage to the last but one, each stage holds one microbatch less than the stage before it.
    """
    stages = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    found = [(stage, stage_memory(job, layout, stage, overhead)) for stage in stages]
    return max(found, key=lambda pair: pair[1].total)
