"""Bytes per rank, by category.

Activations follow Korthikanti et al. 2022 (arXiv 2205.05198): count what each operator keeps for its backward
pass. Their layer (GELU, multi-head attention with its score matrix, dropout) is replaced by the one trained
here: RMSNorm, grouped queries, an attention that keeps its output and one number per row, gated SiLU, no
dropout, and the tensors of DMS. A linear layer whose weight is frozen does not keep its input.
"""

from dataclasses import dataclass, fields

from megatron_dms.planning.job import ELEMENT, Layout, Setting

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes per parameter: bf16; the fp32 gradient buffer of Megatron's DDP; fp32 master weight, two moments."""
DECISIONS = 4
"""fp32 numbers per pair that the eviction keeps: noisy logit, alpha, log(1 - alpha), the same shifted."""
CHUNKS, MIN_CHUNK = 64, 128
"""Of kernels/linear_kl.py: tokens whose logits exist at once under --dms-fuse-output-layer."""


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    weights: float
    teacher: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward passes of all microbatches in flight."""
    logits: float
    """Of student and teacher on the last stage; where the output layer is fused, what takes their place."""
    working: float
    """While one layer's backward pass runs; with full recompute that layer's activations are among it."""
    overhead: float

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


def layer_tensors(setting: Setting, layout: Layout) -> dict[str, float]:
    """Bytes that one layer keeps of one microbatch without recompute, by tensor.

    Names that begin with "core: " are made again under selective recompute.
    """
    model, recipe = setting.model, setting.recipe
    n, t = layout.tokens(setting), layout.tp
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


def kept_by_layer(setting: Setting, layout: Layout, recompute: str | None = None) -> float:
    """Bytes of one microbatch in one layer. recompute: None means the layout's."""
    tensors = layer_tensors(setting, layout)
    match recompute or layout.recompute:
        case "none":
            return sum(tensors.values())
        case "selective":
            return sum(size for name, size in tensors.items() if not name.startswith("core: "))
        case "full":
            return tensors["layer input"]
        case other:
            raise ValueError(f"recompute is {other!r}, expected none, selective or full")


def _activations(setting: Setting, layout: Layout, stage: int) -> float:
    """All layers of a stage; behind the first stage also the teacher's hidden states, which arrive in one
    tensor with the student's (training/teacher.py); on the last one what the final norm keeps."""
    stream = layer_tensors(setting, layout)["layer input"]
    each = setting.model.layers // layout.pp * kept_by_layer(setting, layout)
    if stage > 0:
        each += stream
    if stage == layout.pp - 1:
        each += stream * (2 if setting.recipe.trains_all else 1)  # the final norm's input, the output layer's
    return layout.in_flight(setting, stage) * each


def _logits(setting: Setting, layout: Layout) -> float:
    """Of one microbatch: two tensors of them, in which gradients take the teacher's place (kernels/kl.py)."""
    model, n = setting.model, layout.tokens(setting)
    columns = model.padded_vocab(layout.tp) / layout.tp
    row = columns * setting.logits_bytes
    if not setting.fuse_output_layer:
        return 2 * n * row
    hidden_states = 3 * ELEMENT * n * model.hidden  # student's, teacher's, the student's gradient: all tokens
    # the output weight's gradient, summed in fp32 and then rounded
    gradient = (4 + ELEMENT) * columns * model.hidden if setting.recipe.trains_all else 0
    return 2 * min(n, max(MIN_CHUNK, -(-n // CHUNKS))) * row + hidden_states + gradient


def _working(setting: Setting, layout: Layout) -> float:
    """Gradients of gate, up and their product; an input and its gradient in full length."""
    model, n = setting.model, layout.tokens(setting)
    size = ELEMENT * n * (3 * model.ffn / layout.tp + 2 * model.hidden)
    return size + (kept_by_layer(setting, layout, "none") if layout.recompute == "full" else 0)


def stage_memory(setting: Setting, layout: Layout, stage: int, overhead: float) -> Memory:
    """Of a rank of one pipeline stage (0 = first), at its peak; overhead in bytes."""
    model, recipe, (t, p) = setting.model, setting.recipe, (layout.tp, layout.pp)
    own = model.stage_parameters(t, p, stage, recipe.linear)
    plain = model.stage_parameters(t, p, stage)
    trained = own if recipe.trains_all else own - plain
    shards = layout.dp * layout.cp if setting.distributed_optimizer else 1
    return Memory(
        weights=WEIGHT * own,
        teacher=WEIGHT * plain if recipe.own_teacher else 0,
        gradients=GRADIENT * trained,
        optimizer=OPTIMIZER * trained / shards,
        activations=_activations(setting, layout, stage),
        logits=_logits(setting, layout) if stage == p - 1 else 0,
        working=_working(setting, layout),
        overhead=overhead,
    )


def peak_memory(setting: Setting, layout: Layout, overhead: float) -> tuple[int, Memory]:
    """(stage, its memory) of the fullest stage.

    Between the second and the last one, each stage holds a microbatch less than the one before it.
    """
    stages = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    found = [(stage, stage_memory(setting, layout, stage, overhead)) for stage in stages]
    return max(found, key=lambda pair: pair[1].total)
