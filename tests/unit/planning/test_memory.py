"""Planning: memory per rank, by hand, and against what a real layer keeps for its backward pass."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.kernels.checks import with_wide_rows
from megatron_dms.mcore import attention
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.mcore.layer_specs import dms_block_spec
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.planning.job import RECIPES, RECOMPUTE, Job, RankLayout
from megatron_dms.planning.memory import kept_by_layer, layer_tensors, peak_memory, stage_memory
from megatron_dms.planning.models import ModelSize, preset
from megatron_dms.training.trainable import freeze_all_but_predictor
from tests.support.mcore_cases import transformer_config

pytestmark = pytest.mark.usefixtures("one_process")

# hidden 8, MLP 16, 4 query heads and 2 KV heads of 4: q 16, kv 8; 100 words are 128 rows, or 256 at TP 2
MODEL = ModelSize("small", 4, 8, 16, 4, 2, 4, 100, 64)
PAPER, ADAPTER = (Job(MODEL, RECIPES[name], 32, 8) for name in ("paper", "adapter"))


def test_a_layer_by_hand() -> None:
    """Counts bytes per token: bf16, except log-sum-exp (4 heads) and decisions (4 numbers of 2 groups) in
    fp32.

    Catches: a tensor forgotten or counted twice, TP where there is none, SP that divides nothing.
    """
    stream, qk, v, lse, decisions, gates, out, product = 16, 2 * 24, 2 * 10, 16, 32, 64, 32, 32
    whole = 4 * stream + qk + v + lse + decisions + gates + out + product
    frozen = 3 * stream + qk + v + lse + decisions + gates + out  # the third: the predictor's input
    for sizes, expected in [
        ((PAPER, "none"), whole),
        ((PAPER, "selective"), whole - lse - decisions),  # the output projection keeps its input
        ((PAPER, "full"), stream),
        ((ADAPTER, "none"), frozen),
        ((ADAPTER, "selective"), frozen - lse - decisions - out),
        ((ADAPTER, "full"), stream),
    ]:
        job, recompute = sizes
        assert kept_by_layer(job, RankLayout(recompute=recompute)) == 32 * expected, sizes
    divided = RankLayout(tp=2, micro=3)
    assert kept_by_layer(PAPER, divided) == 3 * 32 * (4 * stream + (whole - 4 * stream) / 2)
    assert kept_by_layer(PAPER, replace(divided, sp=True)) == 3 * 32 * whole / 2
    # the exchange of heads: the kernel's output is not the projection's input; at TP 2 x CP 2, two copies of
    # keys, values and decisions
    assert kept_by_layer(PAPER, RankLayout(cp=2)) == 16 * (whole + out)
    assert kept_by_layer(ADAPTER, RankLayout(cp=2)) == 16 * frozen
    copied = whole + out + 2 * (8 + 8 + 2) + decisions
    assert kept_by_layer(PAPER, replace(divided, sp=True, cp=2)) == 3 * 16 * copied / 2
    normed = replace(PAPER, model=replace(MODEL, qk_norm=True))
    assert kept_by_layer(normed, RankLayout()) == 32 * (whole + 2 * 32 + 2 * 16)
    with pytest.raises(ValueError, match="recompute is 'some'"):
        kept_by_layer(PAPER, RankLayout(), "some")


def test_a_rank_by_hand() -> None:
    """Counts TP 2 x PP 2 x DP 2 with two layers a stage. Catches: a category of the wrong stage, in-flight
    microbatches of the wrong number, optimizer state not divided, a teacher where the student is its own."""
    layout = RankLayout(tp=2, pp=2, dp=2, sp=True)  # 4 microbatches
    layer = 8 * (32 + 16 + 48) // 2 + 16  # matrices over TP, two norms
    first = 2 * layer + 256 * 8 // 2
    last = first + 8
    each = kept_by_layer(PAPER, layout)
    stream = 32 * 16 / 2
    own = stage_memory(PAPER, layout, 0, 1000)
    assert (own.weights, own.teacher, own.gradients) == (2 * first, 2 * first, 4 * first)
    assert (own.optimizer, own.logits, own.overhead) == (12 * first / 2, 0, 1000)
    assert own.activations == 2 * 2 * each  # two in flight, two layers
    own = stage_memory(PAPER, layout, 1, 0)
    assert own.weights == 2 * last
    # one in flight: the teacher's hidden states, two layers, the final norm's input and output
    assert own.activations == 2 * each + 3 * stream
    assert own.logits == 2 * 32 * 128 * 2
    assert own.working == 2 * 32 * (3 * 16 / 2 + 2 * 8)
    assert own.total == sum(vars(own).values())
    split = stage_memory(PAPER, replace(layout, cp=4), 0, 0)  # the optimizer is divided over CP too
    assert split.optimizer == 12 * first / 8 and split.gradients == 4 * first
    undivided = stage_memory(replace(PAPER, distributed_optimizer=False), layout, 0, 0)
    assert undivided.optimizer == 12 * first

    own = stage_memory(ADAPTER, layout, 0, 0)
    predictor = 2 * (2 * 8 // 2 + 8)
    assert own.weights == 2 * (first + predictor) and own.teacher == 0
    assert (own.gradients, own.optimizer) == (4 * predictor, 12 * predictor / 2)
    full = replace(layout, recompute="full")
    assert stage_memory(PAPER, full, 0, 0).working == own.working + each
    # fewer microbatches than stages
    assert stage_memory(replace(PAPER, batch=2), layout, 0, 0).activations == 2 * each


def test_logits_of_a_fused_output_layer() -> None:
    """Counts 1 / 64 of the tokens, at least 128, of student and teacher; three hidden states; and the
    weight's gradient. Catches: a chunk that grows with the context where it must not, a gradient where the
    base is frozen."""
    model = replace(MODEL, positions=2**16)
    for tokens, chunk in [(64, 64), (4096, 128), (65536, 1024)]:
        long = replace(PAPER, model=model, context=tokens, fuse_output_layer=True, logits_bytes=4)
        found = stage_memory(long, RankLayout(), 0, 0).logits
        assert found == 2 * chunk * 128 * 4 + 3 * 2 * tokens * 8 + 6 * 128 * 8
        frozen = replace(long, recipe=RECIPES["adapter"])
        assert found - stage_memory(frozen, RankLayout(), 0, 0).logits == 6 * 128 * 8
    assert stage_memory(replace(PAPER, logits_bytes=4), RankLayout(), 0, 0).logits == 2 * 32 * 128 * 4


def test_the_fullest_stage_is_found() -> None:
    """Compares with all stages. Catches: a stage in the middle that is fuller than those looked at."""
    model = preset("qwen-r1-1.5b")
    for recipe in RECIPES.values():
        for fused in (False, True):
            job = Job(model, recipe, 8192, 64, fuse_output_layer=fused)
            for pp in (1, 2, 4, 7, 14):
                for recompute in RECOMPUTE:
                    layout = RankLayout(tp=2, pp=pp, sp=True, recompute=recompute)
                    every = [stage_memory(job, layout, stage, 5.0) for stage in range(pp)]
                    stage, own = peak_memory(job, layout, 5.0)
                    assert own == every[stage] and own.total == max(other.total for other in every)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_more_of_anything_parallel_needs_no_more_memory(name: str, recipe: str) -> None:
    """Catches: a category that TP, SP, CP or DP makes larger, or recompute."""
    job = Job(preset(name), RECIPES[recipe], 8192, 64)
    base = RankLayout(tp=2)
    for changes in [{"tp": 4}, {"tp": 8}, {"sp": True}, {"cp": 2}, {"dp": 2}, {"recompute": "selective"}]:
        more = replace(base, **changes)
        before, after = (peak_memory(job, layout, 0)[1] for layout in (base, more))
        assert all(getattr(after, key) <= size for key, size in vars(before).items()), changes
        assert after.total < before.total, changes
    weights = [stage_memory(job, RankLayout(pp=pp), 0, 0).weights for pp in (1, 2, 4)]
    assert weights == sorted(weights, reverse=True)


class _FlashLike(torch.autograd.Function):
    """Keeps the tensors that the Triton back-end keeps (kernels/triton_attention.py); its result is not
    looked at."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor) -> Tensor:
        q, k, v = (with_wide_rows(x) for x in (q, k, v))
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, log_keep, out, torch.zeros(q.shape[:3]))
        return out


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and one number per row, as the fused kernels do; torch keeps more on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.zeros(x.shape[:-1]))
        return F.layer_norm(x, x.shape[-1:], weight)


def kept(recipe: str, size: ModelSize) -> int:
    """Return the bytes of distinct storages, without parameters, that a forward pass in fp32 keeps.

    RoPE's tables are left out, because all layers share them on a GPU.
    """
    predictor, train = ("linear", "predictor") if recipe == "adapter" else ("query_channel", "all")
    dms = DMSConfig(predictor=predictor, train=train, attention_backend="flash", window=16)
    config = transformer_config(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        kv_channels=size.head_size,
        num_attention_heads=size.heads,
        num_query_groups=size.groups,
        qk_layernorm=size.qk_norm,
        add_qkv_bias=False,
        bias_activation_fusion=True,
    )
    T = size.positions
    model = GPTModel(
        config,
        dms_block_spec(config, dms=dms),
        vocab_size=size.vocab,
        max_sequence_length=T,
        position_embedding_type="rope",
    )
    if recipe == "adapter":
        freeze_all_but_predictor(model, dms)
    account = CompressionAccount(
        ModelShape(size.layers, size.groups, size.layers, None),
        target=0.5,
        tokens=torch.full((1,), float(T)),
        loss_weight=1.0,
    )
    record = Microbatch(
        sample_ids=torch.arange(1),
        valid=torch.ones(1, T, dtype=torch.bool),
        phase=Phase.SOFT,
        seed=1,
        account=account,
    )
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters and x.shape != (T, 1, 1, size.head_size):
            storages[x.untyped_storage().data_ptr()] = x  # alive, so that no other takes its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.zeros(1, T, dtype=torch.long), torch.arange(T)[None], None, packed_seq_params=record)
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_keeps_what_is_counted(recipe: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers' difference of a real model, with attention and norms that keep what fused kernels do.

    In fp32, so that what is bf16 in the count is doubled. Left over: one number per norm and row, and the
    logit that leaves the values when they are laid out anew. Catches: a tensor that is not counted, or that
    is not kept.
    """
    size = ModelSize("real", 3, 64, 160, 4, 2, 16, 128, 256, qk_norm=qk_norm)
    monkeypatch.setattr(
        attention,
        "attention_backend",
        lambda name, **options: (
            lambda q, k, v, log_keep, *rest: _FlashLike.apply(q, k, v, log_keep.contiguous())
        ),
    )
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: _FusedNorm.apply(x, weight))
    found = (kept(recipe, size) - kept(recipe, replace(size, layers=1))) / 2
    job = Job(size, RECIPES[recipe], size.positions, 1)
    tensors = layer_tensors(job, RankLayout())
    in_fp32 = ("core: log-sum-exp", "core: decisions")
    counted = sum(count * (1 if name in in_fp32 else 2) for name, count in tensors.items())
    assert found == pytest.approx(counted, rel=0.008)
