"""Planning: the time of a training step, by hand, and what must never make it longer or shorter."""

from dataclasses import replace

import pytest

from megatron_dms.planning.devices import DEVICES, Assumptions, Device
from megatron_dms.planning.job import RECIPES, Job, RankLayout
from megatron_dms.planning.models import ModelSize, preset
from megatron_dms.planning.search import plan_layout, steps_to
from megatron_dms.planning.step_time import passes, stage_work, step_flops, step_time

# hidden 8, MLP 16, 4 query heads and 2 KV heads of 4: 768 elements a layer; 128 rows of vocabulary
MODEL = ModelSize("small", 4, 8, 16, 4, 2, 4, 128, 64)
PAPER, ADAPTER = (Job(MODEL, RECIPES[name], 32, 8) for name in ("paper", "adapter"))
LAYER, TABLE, TOKENS = 768, 128 * 8, 32
PLAIN = Assumptions(
    matmul=0.5, attention=0.25, memory=0.5, network=0.5, latency=0.0, overhead=0.0, slowdown=1.0
)
FAST = Device("fast", 1e15, 1e12, 1e30, 1e30, 1e30)
"""Only arithmetic takes time."""


def test_flops_by_hand() -> None:
    """A linear layer has 4 passes where all is trained, 3 with a frozen base, and one more under full
    recompute. Catches: a pass too many or too few, an output layer that is recomputed, a square of T not
    halved."""
    work = stage_work(PAPER, RankLayout(), 0)
    assert work.matmul == 2 * TOKENS * (4 * LAYER * 4 + TABLE * 4)
    # causal: query i reads i keys, two products of 2 FLOPs for each of 16 channels: 2 T^2 q
    assert work.attention == 4 * (1 + 2.5 + 1) * 2 * TOKENS**2 * 16
    assert work.weights == 2 * (4 * LAYER * 4 + TABLE * 4)
    work = stage_work(ADAPTER, RankLayout(), 0)
    assert work.matmul == 2 * TOKENS * (4 * LAYER * 3 + TABLE * 3 + 4 * 8 * 2 * 3)
    full = replace(RankLayout(), recompute="full")
    again = stage_work(PAPER, full, 0)
    assert again.matmul - stage_work(PAPER, RankLayout(), 0).matmul == 2 * TOKENS * 4 * LAYER
    assert again.attention == 4 * 5.5 * 2 * TOKENS**2 * 16
    selective = stage_work(PAPER, replace(RankLayout(), recompute="selective"), 0)
    assert selective.attention == again.attention and selective.matmul == 2 * TOKENS * (
        4 * LAYER * 4 + TABLE * 4
    )
    assert passes(ADAPTER, full) == (4, 5.5)
    # a step is 8 samples, whatever the layout
    for layout in (RankLayout(), RankLayout(tp=2, pp=2, cp=2, dp=2, micro=2, sp=True), RankLayout(pp=4)):
        # 256 rows of vocabulary where TP is 2
        sample = 2 * TOKENS * 4 * (4 * LAYER + TABLE * layout.tp) + 4 * 9 * TOKENS**2 * 16
        assert step_flops(PAPER, layout) == 8 * sample
    # ranks share the work: TP and CP divide it, and a stage has its layers, the last one the output layer
    shared = stage_work(PAPER, RankLayout(tp=2, pp=2, cp=2), 0)
    assert shared.matmul == 2 * TOKENS * 2 * LAYER * 4 / 4 and shared.attention * 8 == 4 * 9 * TOKENS**2 * 16


def test_messages_by_hand() -> None:
    """Catches: a factor (t - 1) / t left out, an all-reduce counted as one half, the teacher's half of a
    border forgotten."""
    hidden_states = 2 * 8 * TOKENS
    sp = stage_work(PAPER, RankLayout(tp=2, sp=True), 0)
    # per layer: 4 in each of forward, backward and teacher, 2 inputs gathered again for weight gradients
    assert sp.tp_messages == 4 * (12 + 2) + 4
    assert sp.tp == (4 * 14 + 4) * hidden_states / 2
    plain = stage_work(PAPER, RankLayout(tp=2), 0)
    assert plain.tp == (4 * 12 + 2) * hidden_states / 2 and plain.tp_messages == 25
    assert stage_work(ADAPTER, RankLayout(tp=2, sp=True), 0).tp == (4 * 12 + 4) * hidden_states / 2
    border = stage_work(PAPER, RankLayout(pp=4), 1)
    assert (border.pp, border.pp_messages) == (4 * 2 * hidden_states, 4)
    assert stage_work(PAPER, RankLayout(pp=4), 0).pp_messages == 2
    assert stage_work(PAPER, RankLayout(), 0).pp == 0
    # forward, backward, teacher: 16 channels of queries and of output, 8 of keys and of values; at CP 4 two
    # ranks share each of the two KV heads
    two, four = (stage_work(PAPER, RankLayout(cp=cp), 0) for cp in (2, 4))
    assert two.cp == 4 * 3 * 2 * (2 * 16 + 2 * 8) * TOKENS / 2 * 1 / 2 and two.cp_messages == 4 * 3 * 3
    assert four.cp == 4 * 3 * 2 * (2 * 16 + 2 * 2 * 8) * TOKENS / 4 * 3 / 4
    assert stage_work(PAPER, RankLayout(cp=2, recompute="selective"), 0).cp == two.cp * 4 / 3


def test_moved_bytes_by_hand() -> None:
    """One layer, forward: norms 4, sums 6 streams; RoPE; SiLU; of the student values and two fadings.

    Catches: a backward pass that is free, a teacher that pays for DMS.
    """
    stream, qk, gate, dms = 16, 48, 96, 2 * 16 + 4 * 32
    teacher = 10 * stream + 2 * qk + gate
    loss = 8 * TOKENS * 128 * 2
    assert stage_work(PAPER, RankLayout(), 0).memory == 4 * TOKENS * (3 * (teacher + dms) + teacher) + loss
    parted = 2 * 2 * 2 * (2 * 16 + 2 * 8)  # what is exchanged, packed and unpacked
    assert stage_work(PAPER, RankLayout(cp=2), 0).memory == pytest.approx(
        4 * TOKENS / 2 * (3 * (teacher + dms + parted) + teacher + parted) + loss / 2
    )
    adapter = teacher + 2 * 16 + 2 * stream
    assert stage_work(ADAPTER, RankLayout(), 0).memory == 4 * TOKENS * (3 * adapter + teacher) + loss


def test_the_pipeline_by_hand() -> None:
    """Catches: a bubble of another size than (p - 1) / (m + p - 1), a step that does not wait for the slowest
    stage."""
    even = replace(PAPER, model=replace(MODEL, vocab=1))
    for pp in (2, 4):
        layout = RankLayout(pp=pp)
        found = step_time(even, layout, FAST, PLAIN)
        middle = stage_work(even, layout, 0)
        last = stage_work(even, layout, pp - 1)
        slow = last.matmul / 0.5e15 + last.attention / 0.25e15
        fast = middle.matmul / 0.5e15 + middle.attention / 0.25e15
        assert found.roofline == pytest.approx(8 * slow + (pp - 1) * fast)
        assert found.bubble == pytest.approx((pp - 1) * fast)
    one = step_time(PAPER, RankLayout(), FAST, PLAIN)
    assert one.bubble == 0
    work = stage_work(PAPER, RankLayout(), 0)
    assert one.matmul == pytest.approx(8 * work.matmul / 0.5e15)
    assert one.attention == pytest.approx(8 * work.attention / 0.25e15)


def test_once_a_step_by_hand() -> None:
    """Catches: gradients in bf16, an optimizer that is not divided, a network within a node."""
    device = Device("links", 1e30, 1e12, 100.0, 1000.0, 10.0, per_node=4)
    count = 4 * (LAYER + 2 * 8) + 2 * TABLE + 8
    found = step_time(PAPER, RankLayout(dp=4), device, PLAIN)
    assert found.dp == pytest.approx(6 * count * 3 / 4 / 500)
    assert found.optimizer == pytest.approx((30 * count / 4 + 8 * count) / 50)
    split = step_time(PAPER, RankLayout(dp=2, cp=2), device, PLAIN)  # gradients are added up over CP too
    assert (split.dp, split.optimizer) == (found.dp, found.optimizer)
    undivided = replace(PAPER, distributed_optimizer=False)
    found = step_time(undivided, RankLayout(dp=8), device, PLAIN)
    assert found.dp == pytest.approx(8 * count * 7 / 8 / 5)  # beyond a node
    assert found.optimizer == pytest.approx(38 * count / 50)
    half = replace(PLAIN, exposed_dp=0.5)
    assert step_time(undivided, RankLayout(dp=8), device, half).dp == pytest.approx(found.dp / 2)
    latency = replace(PLAIN, latency=1.0, exposed_dp=0.0)
    assert step_time(PAPER, RankLayout(dp=8), device, latency).dp == pytest.approx(2 * 3)
    tied = replace(PAPER, model=replace(MODEL, tied=True))
    copies = step_time(tied, RankLayout(pp=2), device, PLAIN).dp  # both stages' embeddings
    assert copies == pytest.approx(4 * TABLE / 500)
    frozen = step_time(ADAPTER, RankLayout(dp=4), device, PLAIN)
    assert frozen.dp == pytest.approx(6 * 4 * (2 * 8 + 8) * 3 / 4 / 500)


def test_small_products_are_bound_by_their_weights() -> None:
    """Catches: a roofline with one side."""
    slow = replace(FAST, flops=1e30, bandwidth=100.0)
    found = step_time(PAPER, RankLayout(), slow, PLAIN)
    assert found.matmul == pytest.approx(8 * stage_work(PAPER, RankLayout(), 0).weights / 50)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_slower(recipe: str) -> None:
    """More recompute, more trained, worse shares of the hardware: never faster. Fewer microbatches: a larger
    bubble."""
    job = Job(preset("llama-3.1-8b"), RECIPES[recipe], 8192, 64)
    device, assumed, layout = DEVICES["h100"], Assumptions(), RankLayout(tp=4, pp=2, dp=2, sp=True)

    def seconds(layout: RankLayout = layout, assumed: Assumptions = assumed) -> float:
        return plan_layout(job, layout, device, assumed).seconds

    none, selective, full = (seconds(replace(layout, recompute=r)) for r in ("none", "selective", "full"))
    assert none < selective < full
    for name in ("matmul", "attention", "memory", "network"):
        assert seconds(assumed=replace(assumed, **{name: 0.1})) > none, name
    assert seconds(assumed=replace(assumed, latency=1e-3)) > none
    assert seconds(assumed=replace(assumed, slowdown=2 * assumed.slowdown)) == pytest.approx(2 * none)
    few, many = (step_time(job, replace(layout, micro=b), device, assumed) for b in (8, 1))
    assert few.bubble / few.roofline > many.bubble / many.roofline


def test_steps_to_a_ratio() -> None:
    """The paper reaches CR 4 after 300 steps and CR 8 after 700; NVIDIA reaches CR 16 after 510."""
    assert [steps_to(cr, 100, 0) for cr in (1, 4, 8)] == [0, 300, 700]
    assert steps_to(8, 100, 200) == 900 and steps_to(16, 34, 0) == 510
