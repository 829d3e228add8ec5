"""Seconds of a training step, from a roofline.

Products run at a share of the device's FLOPs. Everything else runs at a share of the bandwidth of its memory
or of a link. The parts follow one after the other.

A linear layer has 1 forward pass, 1 pass for the gradient of its input, 1 for the gradient of its weight
unless the weight is frozen, 1 in the teacher, and 1 under full recompute. Attention has 1 forward pass, 2.5
backward (five products instead of two, as flash kernels compute the scores again), 1 in the teacher, and 1
under either recompute. Attention is counted as causal and dense, without what the Triton back-end saves on
evicted keys.
"""

import math
from dataclasses import dataclass, fields

from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.job import ELEMENT, Job, RankLayout
from megatron_dms.planning.memory import GRADIENT, WEIGHT

ATTENTION_BACKWARD = 2.5
"""Time of the backward pass of attention as a multiple of its forward pass."""
LOSS_PASSES = 8
"""How often the logits of a rank cross its memory: both are written and read, a gradient replaces one."""
OPTIMIZER_BYTES = 30
"""Bytes for a parameter of a rank's share: gradient, master, moments (16), three written (12), bf16 (2)."""
GRADIENT_SWEEPS = 2 * GRADIENT
"""Bytes for each trained parameter: the norm of the gradient, and zeroing it."""


@dataclass(frozen=True)
class Work:
    """What one microbatch costs a rank of a stage.

    matmul and attention are in FLOPs; memory, weights, tp, cp and pp are in bytes.
    """

    matmul: float
    attention: float
    memory: float
    weights: float
    """Bytes of weights that the products read, which bound their time from below."""
    tp: float
    tp_messages: int
    cp: float
    cp_messages: int
    pp: float
    pp_messages: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest rank, part by part; `bubble` is waiting for other stages."""

    matmul: float
    attention: float
    memory: float
    tp: float
    cp: float
    pp: float
    bubble: float
    dp: float
    optimizer: float

    @property
    def roofline(self) -> float:
        """The sum of all parts, before any slowdown."""
        return sum(getattr(self, item.name) for item in fields(self))


def passes(job: Job, layout: RankLayout) -> tuple[float, float]:
    """Return the passes of a linear layer and of attention; student and teacher together."""
    recompute = layout.recompute
    linear = 1 + (2 if job.recipe.trains_all else 1) + 1 + (recompute == "full")
    return linear, 1 + ATTENTION_BACKWARD + 1 + (recompute != "none")


def moved_by_layer(job: Job, layout: RankLayout, teacher: bool) -> float:
    """Return the bytes that element-wise operations of a layer move in a forward pass of a microbatch."""
    model, n, t = job.model, layout.tokens(job), layout.tp
    stream = ELEMENT * model.hidden * (n / t if layout.sp else n)
    qk = ELEMENT * (model.q + model.kv) * n / t
    moved = 2 * 2 * stream + 2 * 3 * stream  # two norms (in, out), two residual sums (in, in, out)
    moved += 2 * qk * (2 if model.qk_norm else 1)  # RoPE, norms of queries and keys
    moved += ELEMENT * 3 * model.ffn * n / t  # gate and up in, product out
    moved += 2 * 2 * exchanged(job, layout)  # packed and unpacked
    if not teacher:
        moved += 2 * ELEMENT * model.kv * n / t  # the logit joins the values
        if job.recipe.linear:
            moved += 2 * stream  # the predictor's norm
        else:
            moved += 2 * 2 * ELEMENT * model.q * n / t  # the borrowed channel is faded twice
    return moved


def exchanged(job: Job, layout: RankLayout) -> float:
    """Return the bytes that a rank exchanges with its context-parallel group in a forward pass of a layer.

    Queries, keys and values are sent, the output comes back (mcore/context_parallel.py). The rank's own share
    is included.
    """
    if layout.cp == 1:
        return 0
    model = job.model
    channels = 2 * model.q + 2 * model.kv * layout.kv_copies(model)
    return ELEMENT * channels * layout.tokens(job) / layout.tp


def stage_work(job: Job, layout: RankLayout, stage: int) -> Work:
    """Return the work of one microbatch: forward and backward, teacher and student."""
    model, recipe, n, t = job.model, job.recipe, layout.tokens(job), layout.tp
    layers, last = model.layers // layout.pp, stage == layout.pp - 1
    linear, attention = passes(job, layout)
    full = layout.recompute == "full"

    elements = layers * model.layer_matmul * linear
    if recipe.linear:  # trained: forward, two gradients, and recompute
        elements += layers * model.hidden * model.groups * (3 + full)
    moved = layers * (moved_by_layer(job, layout, False) * (3 + full) + moved_by_layer(job, layout, True))
    if last:  # the output layer is never recomputed
        table = model.padded_vocab(t) * model.hidden
        elements += table * (linear - full)
        moved += LOSS_PASSES * n * model.padded_vocab(t) / t * job.logits_bytes

    # A gather or a scatter of the whole stream; an all-reduce is both. Two pairs in each pass of a layer.
    unit = ELEMENT * model.hidden * n * (t - 1) / t
    whole_passes = 1 + 1 + 1 + full  # forward, backward, teacher
    gathers = layers * (4 * whole_passes + (2 if layout.sp and recipe.trains_all else 0))
    gathers += (4 if layout.sp else 2) * last  # around the output layer
    messages = gathers if layout.sp else gathers // 2

    # Forward, backward, teacher, recompute of attention; three all-to-alls each.
    exchanges = layers * (1 + 1 + 1 + (layout.recompute != "none")) if layout.cp > 1 else 0
    sent = exchanges * exchanged(job, layout) * (layout.cp - 1) / layout.cp

    # Student's and teacher's hidden states forward, their gradients back; a middle stage does both twice.
    borders = 0 if layout.pp == 1 else 2 if stage in (0, layout.pp - 1) else 4
    border = 2 * ELEMENT * model.hidden * n / (t if layout.sp else 1)
    return Work(
        matmul=2 * elements * n / t,
        attention=layers * attention * 2 * job.context * model.q * n / t,
        memory=moved,
        weights=WEIGHT * elements / t,
        tp=gathers * unit,
        tp_messages=messages if t > 1 else 0,
        cp=sent,
        cp_messages=3 * exchanges,
        pp=borders * border,
        pp_messages=borders,
    )


def _parts(work: Work, layout: RankLayout, device: Device, assumed: Assumptions) -> StepTime:
    """Return the seconds of one microbatch."""

    def sent(size: float, messages: int, span: int) -> float:
        """Return the seconds of messages that stay among `span` neighbouring ranks."""
        link = device.node_link if span <= device.per_node else device.network
        return size / (link * assumed.network) + messages * assumed.latency

    moving = device.bandwidth * assumed.memory
    return StepTime(
        matmul=max(work.matmul / (device.flops * assumed.matmul), work.weights / moving),
        attention=work.attention / (device.flops * assumed.attention),
        memory=work.memory / moving,
        tp=sent(work.tp, work.tp_messages, layout.tp),
        cp=sent(work.cp, work.cp_messages, layout.tp * layout.cp),
        pp=sent(work.pp, work.pp_messages, layout.ranks),
        bubble=0,
        dp=0,
        optimizer=0,
    )


def step_flops(job: Job, layout: RankLayout) -> float:
    """Return the FLOPs of all ranks in one step, including recompute."""
    every = [stage_work(job, layout, stage) for stage in range(layout.pp)]
    ranks = layout.tp * layout.cp * layout.dp
    return ranks * layout.microbatches(job) * sum(work.matmul + work.attention for work in every)


def step_time(job: Job, layout: RankLayout, device: Device, assumed: Assumptions) -> StepTime:
    """Return the time of a step under 1F1B: one microbatch passes all stages, then the slowest sets the pace.

    With p equal stages and m microbatches this is (m + p - 1) times a stage's time, of which the share
    (p - 1) / (m + p - 1) is the bubble.
    """
    p, m = layout.pp, layout.microbatches(job)
    kinds = {0: 1, p - 1: 1} | ({1: p - 2} if p > 2 else {})  # stage -> how many are like it
    found = {stage: _parts(stage_work(job, layout, stage), layout, device, assumed) for stage in kinds}
    slowest = max(found.values(), key=lambda parts: parts.roofline)
    fill = sum(count * found[stage].roofline for stage, count in kinds.items()) - slowest.roofline
    dp, optimizer = _once_a_step(job, layout, device, assumed)
    busy = {name: m * getattr(slowest, name) for name in ("matmul", "attention", "memory", "tp", "cp", "pp")}
    return StepTime(**busy, bubble=fill, dp=dp, optimizer=optimizer)


def _once_a_step(job: Job, layout: RankLayout, device: Device, assumed: Assumptions) -> tuple[float, float]:
    """Return the seconds of gradient reduction and of the optimizer, on the stage with most parameters."""
    model, recipe, t, p = job.model, job.recipe, layout.tp, layout.pp
    stages = {0, p - 1}
    if recipe.trains_all:
        trained = max(model.stage_parameters(t, p, stage) for stage in stages)
    else:
        trained = model.layers // p * model.predictor_parameters(t)
    copies = layout.dp * layout.cp
    shards = copies if job.distributed_optimizer else 1
    link = device.node_link if t * copies <= device.per_node else device.network
    # reduce-scatter in fp32, all-gather of bf16 weights; or an all-reduce in fp32
    each = GRADIENT + WEIGHT if job.distributed_optimizer else 2 * GRADIENT
    seconds = each * trained * (copies - 1) / copies / (link * assumed.network) * assumed.exposed_dp
    if copies > 1:
        seconds += 2 * assumed.latency * math.ceil(math.log2(copies))
    if model.tied and p > 1 and recipe.trains_all:  # both copies of the embedding
        table = GRADIENT * model.padded_vocab(t) * model.hidden / t
        across = device.node_link if layout.ranks <= device.per_node else device.network
        seconds += table / (across * assumed.network) + assumed.latency
    swept = OPTIMIZER_BYTES * trained / shards + GRADIENT_SWEEPS * trained
    return seconds, swept / (device.bandwidth * assumed.memory)
