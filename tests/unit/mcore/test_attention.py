"""The plug-in's attention in Megatron's own GPTModel, in one process, against fp64 written from the
paper's text.

The model runs in fp32. Tolerances are 2e-5 for outputs of order 1 and 1e-4 for gradients; what must be
equal bit for bit is compared so. The CPU platform is not needed: all that is asked of CUDA is a device and
a random state.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.mcore import attention as attention_module
from megatron_dms.mcore.attention import DMSCoreAttention, DMSSelfAttention
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.ops.attention import dms_attention
from megatron_dms.training.trainable import borrowed_rows, freeze_all_but_predictor, zero_borrowed_rows
from tests.support.mcore_cases import (
    HIDDEN,
    LAYERS,
    PER_GROUP,
    PREDICTORS,
    ROWS,
    SAMPLES,
    SETTINGS,
    VOCAB,
    D,
    G,
    H,
    T,
    attend,
    attend_and_report,
    build,
    changed_rows,
    check_attention_and_gradients,
    hidden_states,
    in_fp64,
    microbatch,
    reference,
    rms,
    transformer_config,
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize(("phase", "fade"), [(Phase.HARD, 0.0), (Phase.SOFT, 0.0), (Phase.ZEROING, 0.6)])
def test_attention_and_gradients(predictor: str, granularity: str, phase: Phase, fade: float) -> None:
    """Catches: the raw value read after RoPE or before the q-norm, of another head or channel; the linear
    predictor fed the normed input; the borrowed channel scaled only once; scale and offset mixed up; lag or
    window off by one; noise of another layer, head or sample; a decision that lets no gradient through."""
    check_attention_and_gradients(
        DMSConfig(predictor=predictor, granularity=granularity, **SETTINGS), phase, fade
    )


def test_without_query_norm_and_bias() -> None:
    """The Llama family has neither. Catches: a predictor that needs a q-norm."""
    dms = DMSConfig(**SETTINGS)
    model, record = build(dms, qk_layernorm=False, add_qkv_bias=False), microbatch(Phase.HARD)
    expected, alpha, _ = reference(in_fp64(model), hidden_states().double(), dms, record)
    found = attend_and_report(model, hidden_states(), record, alpha)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("predictor", ["query_channel", "key_channel"])
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_borrowed_channel_is_zero_before_and_after_rope(
    predictor: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the attention itself. After RoPE: entry D-1 of the borrowed heads is exactly 0. Before it:
    entry D/2-1, which RoPE mixes with it, is its own value times cos, with no trace of the borrowed value.
    Catches: channel not zeroed after RoPE; channel not zeroed before RoPE; one head too many or too few."""
    seen = {}

    def spy(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        seen.update(q=q.detach().permute(2, 0, 1, 3), k=k.detach().permute(2, 0, 1, 3))
        return dms_attention(q, k, *rest)

    monkeypatch.setattr(attention_module, "attention_backend", lambda name: spy)
    dms = DMSConfig(predictor=predictor, granularity=granularity, **SETTINGS)
    model, record = build(dms), microbatch(Phase.HARD)
    attend(model, hidden_states(), record)
    _, _, expected = reference(in_fp64(model), hidden_states().double(), dms, record)
    name, heads, stride = ("q", H, PER_GROUP) if predictor == "query_channel" else ("k", G, 1)
    for head in range(heads):
        last = seen[name][1:, :, head, -1]  # at token 0 RoPE does nothing
        assert (last == 0).all() if head % stride == 0 else (last != 0).all(), f"after RoPE, head {head}"
    partner = seen[name][..., D // 2 - 1].double()
    torch.testing.assert_close(
        partner,
        expected[name][..., D // 2 - 1].detach(),
        rtol=1e-5,
        atol=1e-5,
        msg=lambda m: f"before RoPE: {m}",
    )
    for part in "qk":
        torch.testing.assert_close(seen[part].double(), expected[part].detach(), rtol=1e-5, atol=1e-5)


def core(tp: tuple[int, int], cp: tuple[int, int], granularity: str) -> DMSCoreAttention:
    """Return layer 2's core attention on one tensor- and context-parallel (rank, ranks), of 4 KV heads in
    all."""
    groups = {
        name: SimpleNamespace(rank=lambda n=rank: n, size=lambda n=ranks: n)
        for name, (rank, ranks) in {"tp": tp, "cp": cp}.items()
    }
    dms = DMSConfig(granularity=granularity, **SETTINGS)
    config = transformer_config(num_query_groups=H)
    mask_type = attention_module.AttnMaskType.causal
    return DMSCoreAttention(config, 2, mask_type, "self", dms, pg_collection=SimpleNamespace(**groups))


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_decisions_do_not_depend_on_ranks_or_batches(granularity: str) -> None:
    """Soft decisions of two tensor-parallel ranks, of two context-parallel ones, of four that share two
    heads, and of each sample alone, are those of one process, bit for bit. Catches noise by rank: a rank's
    own head numbers (0, 1) for the global ones (2, 3), the place in the microbatch for the sample's id."""
    raw = torch.randn(2, H, T, generator=torch.Generator().manual_seed(6))
    shape = ModelShape(LAYERS, H, LAYERS, None)

    def decide(
        heads: slice, tp: tuple[int, int], cp: tuple[int, int], samples: tuple[int, ...] = SAMPLES
    ) -> Tensor:
        record = microbatch(Phase.SOFT, samples=samples)
        record.account = CompressionAccount(shape, 0.5, record.valid.sum(1).float(), 0.0)
        rows = [SAMPLES.index(sample) for sample in samples]
        return core(tp, cp, granularity)._decide(raw[rows][:, heads], record).log_keep

    one, everything = (0, 1), slice(0, H)
    whole = decide(everything, one, one)
    for heads, tp, cp in [
        *((slice(2 * rank, 2 * rank + 2), (rank, 2), one) for rank in range(2)),
        *((slice(2 * rank, 2 * rank + 2), one, (rank, 2)) for rank in range(2)),
        *((slice(rank, rank + 1), (rank // 2, 2), (rank % 2, 2)) for rank in range(4)),
        *((slice(2 + rank // 2, 3 + rank // 2), (1, 2), (rank, 4)) for rank in range(4)),
    ]:
        assert torch.equal(decide(heads, tp, cp), whole[:, heads]), (tp, cp)
    for row, sample in enumerate(SAMPLES):
        assert torch.equal(decide(everything, one, one, (sample,)), whole[row : row + 1])


BORROWED = [(predictor, granularity) for predictor in ROWS for granularity in ("head", "layer")]


@pytest.mark.parametrize(("predictor", "granularity"), BORROWED)
def test_zeroed_rows_make_every_logit_minus_the_offset(
    predictor: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: rows of another head or channel, the bias forgotten, rows beside the borrowed ones zeroed."""
    logits = []
    original = attention_module.hard_eviction
    monkeypatch.setattr(attention_module, "hard_eviction", lambda z: (logits.append(z), original(z))[1])
    dms = DMSConfig(predictor=predictor, granularity=granularity, **SETTINGS)
    model = build(dms)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero_borrowed_rows(model, dms)
    attend(model, hidden_states(), microbatch(Phase.HARD))
    assert (logits[0] == -dms.alpha_offset).all()
    assert changed_rows(model, before) == {
        f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}": ROWS[predictor]
        for layer in range(LAYERS)
        for kind in ("weight", "bias")
    }
    assert borrowed_rows(model.decoder.layers[0].self_attention, dms)[0][1].tolist() == ROWS[predictor]


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(3))


def logits_of(model: GPTModel, record: Microbatch | None) -> Tensor:
    """Run the model.

    Megatron's own attention needs the causal mask (True = hidden) on a CPU; DMS attention reads none.
    """
    hidden = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    return model(tokens(), torch.arange(T)[None].expand(2, -1), hidden, packed_seq_params=record)


@pytest.mark.parametrize(("predictor", "granularity"), [*BORROWED, ("linear", "head")])
def test_training_the_predictor_alone(predictor: str, granularity: str) -> None:
    """Takes two steps of Adam on a model that is frozen but for its predictor. Catches: a parameter or a
    row of the QKV weight that moves without being asked, a predictor that stays (Adam's momentum
    included), a layer left out."""
    dms = DMSConfig(predictor=predictor, granularity=granularity, train="predictor", **SETTINGS)
    model = build(dms)
    freeze_all_but_predictor(model, dms)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    weights = torch.randn(2, T, VOCAB, generator=torch.Generator().manual_seed(4))
    for _ in range(2):
        optimizer.zero_grad()
        (logits_of(model, microbatch(Phase.SOFT)) * weights).sum().backward()
        optimizer.step()
    layers = [f"decoder.layers.{layer}.self_attention." for layer in range(LAYERS)]
    if predictor == "linear":
        parts = {"norm.weight": HIDDEN, "proj.weight": G, "proj.bias": G}
        expected = {f"{la}dms_predictor.{name}": list(range(n)) for la in layers for name, n in parts.items()}
    else:
        rows = ROWS[predictor]  # with one decision per layer, head 1's take part through the q- or k-norm
        expected = {f"{la}linear_qkv.{kind}": rows for la in layers for kind in ("weight", "bias")}
    assert changed_rows(model, before) == expected


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_unfaded_zeroing_phase_is_the_dense_model(predictor: str) -> None:
    """Compares the zeroing phase with fade 1 with the dense spec and Megatron's own attention. Catches: a
    mask, a scale or a norm that the plug-in changes; parameter names that differ between student and
    teacher."""
    dms = DMSConfig(predictor=predictor, **SETTINGS)
    student, dense = build(dms), build(None)
    own = {name: value for name, value in student.state_dict().items() if "dms_predictor" not in name}
    dense.load_state_dict(own, strict=True)
    found, expected = logits_of(student, microbatch(Phase.ZEROING, fade=1.0)), logits_of(dense, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_norm_and_linear_in_one() -> None:
    """Catches: an epsilon of its own (1e-3 here), a weight applied after the product, a bias lost."""
    layer = build(DMSConfig()).decoder.layers[0].self_attention.linear_qkv
    x = 0.05 * hidden_states()  # small, so that epsilon counts
    found, _ = layer(x)
    normed = rms(x.double(), layer.layer_norm_weight.double())
    expected = normed @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_refuses_a_forward_without_its_record() -> None:
    """Catches: a student that runs without eviction, in silence, where the record was lost on its way."""
    model = build(DMSConfig())
    assert isinstance(model.decoder.layers[0].self_attention, DMSSelfAttention)
    with pytest.raises(TypeError, match="needs packed_seq_params to be a Microbatch"):
        logits_of(model, None)
