"""The plug-in's attention in Megatron's own GPTModel, one process, against fp64 written from DMS's text.

The model runs in fp32. Tolerances: 2e-5 for outputs of order 1, 1e-4 for gradients; what must be equal bit
for bit is compared so. The CPU platform is not needed: all that is asked of CUDA is a device and a random
state."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.mcore import attention as attention_module
from megatron_dms.mcore.attention import DMSCoreAttention, DMSSelfAttention
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.mcore.ledger import CompressionAccount, ModelShape
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.ops.attention import dms_attention
from megatron_dms.ops.eviction import logistic_noise
from megatron_dms.training.trainable import borrowed_rows, freeze_all_but_predictor, zero_borrowed_rows

LAYERS, HIDDEN, H, G, D, VOCAB, T = 2, 24, 4, 2, 8, 37, 11
PER_GROUP = H // G
BASE, EPSILON, SEED = 10000, 1e-3, 77
SAMPLES = (5, 2)
LENGTHS = (11, 7)
PREDICTORS = ("query_channel", "key_channel", "linear")
# Scale and offset of this size make decisions of random weights a true mixture.
SETTINGS = {"alpha_scale": 2.0, "alpha_offset": 0.3, "window": 3, "lag": 1, "temperature": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of one and Megatron's parallel state; everything on the CPU, whatever the machine
    has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(CudaRNGStatesTracker, "fork", lambda self: nullcontext())  # for a dropout of 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def transformer_config(**changes: object) -> TransformerConfig:
    settings = {
        **{"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": 32, "kv_channels": D},
        **{"num_attention_heads": H, "num_query_groups": G, "normalization": "RMSNorm"},
        **{
            "layernorm_epsilon": EPSILON,
            "qk_layernorm": True,
            "add_qkv_bias": True,
            "add_bias_linear": False,
        },
        **{"gated_linear_unit": True, "activation_func": F.silu, "bias_activation_fusion": False},
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "masked_softmax_fusion": False},
        **{"use_cpu_initialization": True, "transformer_impl": "local"},
    }
    return TransformerConfig(**settings | changes)


def build(dms: DMSConfig | None, **changes: object) -> GPTModel:
    """A model whose every parameter is random, norms and biases too; without DMS where `dms` is None."""
    config = transformer_config(**changes)
    spec = dense_block_spec(config) if dms is None else dms_block_spec(config, dms=dms)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="rope",
        rotary_base=BASE,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 1.7, generator=generator)
            else:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def microbatch(phase: Phase, fade: float = 0.0, samples: tuple[int, ...] = SAMPLES) -> Microbatch:
    lengths = torch.tensor([LENGTHS[SAMPLES.index(sample)] for sample in samples])
    account = CompressionAccount(ModelShape(LAYERS, G, LAYERS, None), 0.5, lengths.float(), loss_weight=0.0)
    return Microbatch(
        sample_ids=torch.tensor(samples),
        valid=torch.arange(T)[None] < lengths[:, None],
        phase=phase,
        seed=SEED,
        fade=fade,
        account=None if phase is Phase.ZEROING else account,
    )


def hidden_states() -> Tensor:
    return 2 * torch.randn(T, len(SAMPLES), HIDDEN, generator=torch.Generator().manual_seed(9))


def attend(model: GPTModel, x: Tensor, record: Microbatch, layer: int = 1) -> Tensor:
    """The output of one layer's attention, [T, B, HIDDEN]."""
    rope = model.rotary_pos_emb(T)
    module = model.decoder.layers[layer].self_attention
    out, _ = module(x, None, rotary_pos_emb=(rope, rope), packed_seq_params=record)
    return out


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def rope(x: Tensor) -> Tensor:
    """x [T, B, heads, D]: channels c and c + D/2 of token t are turned by t / BASE ** (2 c / D)."""
    angle = torch.arange(T).double()[:, None] / BASE ** (2 * torch.arange(D // 2).double() / D)
    sin, cos = angle.sin()[:, None, None], angle.cos()[:, None, None]
    one, other = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def reference(
    weights: dict[str, Tensor], x: Tensor, dms: DMSConfig, record: Microbatch, layer: int = 1
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """-> (output [T, B, HIDDEN], decisions before the lag [B, G, T], queries and keys as attended), all
    fp64."""
    normed = rms(x, weights["linear_qkv.layer_norm_weight"])
    qkv = normed @ weights["linear_qkv.weight"].T + weights.get("linear_qkv.bias", 0)
    qkv = qkv.view(T, -1, G, PER_GROUP + 2, D)  # per KV head: its queries, its key, its value
    q, k, v = qkv[..., :PER_GROUP, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    if "q_layernorm.weight" in weights:
        q, k = rms(q, weights["q_layernorm.weight"]), rms(k, weights["k_layernorm.weight"])
    first_only = dms.granularity == "layer"
    q_mask, k_mask = torch.ones(H, D).double(), torch.ones(G, D).double()
    if dms.predictor == "query_channel":
        raw = torch.stack([q[:, :, g * PER_GROUP, -1] for g in range(G)], dim=-1)
        q_mask[[g * PER_GROUP for g in range(G)], -1] = record.fade
    elif dms.predictor == "key_channel":
        raw = k[..., -1]
        k_mask[:, -1] = record.fade
    else:
        raw = rms(x, weights["dms_predictor.norm.weight"]) @ weights["dms_predictor.proj.weight"].T
        raw = raw + weights.get("dms_predictor.proj.bias", 0)
    q, k = rope(q * q_mask) * q_mask, rope(k * k_mask) * k_mask
    if first_only:
        raw = raw[..., :1].expand_as(raw)
    z = (dms.alpha_scale * raw - dms.alpha_offset).permute(1, 2, 0)  # [B, G, T]
    if record.phase is Phase.ZEROING:
        alpha = torch.zeros_like(z)
    elif record.phase is Phase.HARD:
        alpha = (z > 0).double()
    else:
        heads = torch.zeros(G, dtype=torch.long) if first_only else torch.arange(G)
        noise = logistic_noise(SEED, record.sample_ids, layer, heads, torch.arange(T)).double()
        alpha = torch.sigmoid((z + noise) / dms.temperature)

    def attended(i: int, h: int) -> Tensor:
        g, weights_of_keys = h // PER_GROUP, []
        for j in range(i + 1):
            weight = torch.exp((q[i, :, h] * k[j, :, g]).sum(-1) * D**-0.5)  # [B]
            evictable = i - j > dms.window and j + dms.lag < T
            weights_of_keys.append(weight * (1 - alpha[:, g, j + dms.lag]) if evictable else weight)
        weight = torch.stack(weights_of_keys)[..., None]  # [i + 1, B, 1]
        return (weight * v[: i + 1, :, g]).sum(0) / weight.sum(0)

    out = torch.stack([torch.cat([attended(i, h) for h in range(H)], dim=-1) for i in range(T)])
    return out @ weights["linear_proj.weight"].T, alpha, {"q": q, "k": k}


def in_fp64(model: GPTModel, layer: int = 1) -> dict[str, Tensor]:
    module = model.decoder.layers[layer].self_attention
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize(("phase", "fade"), [(Phase.HARD, 0.0), (Phase.SOFT, 0.0), (Phase.ZEROING, 0.6)])
def test_attention_and_gradients(predictor: str, granularity: str, phase: Phase, fade: float) -> None:
    """Catches: the raw value read after RoPE or before the q-norm, of another head or channel; the linear
    predictor fed the normed input; the borrowed channel scaled only once; scale and offset mixed up; lag or
    window off by one; noise of another layer, head or sample; a decision that lets no gradient through."""
    dms = DMSConfig(predictor=predictor, granularity=granularity, **SETTINGS)
    model, record, x = build(dms), microbatch(phase, fade), hidden_states()
    weights = in_fp64(model)
    expected, alpha, _ = reference(weights, x.double(), dms, record)
    found = (
        attend(model, x, record) if phase is Phase.ZEROING else _attend_and_report(model, x, record, alpha)
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(grad)
    expected.backward(grad.double())
    for name, parameter in model.decoder.layers[1].self_attention.named_parameters():
        ours, wanted = parameter.grad, weights[name].grad
        if ours is None or wanted is None:  # hard decisions and the zeroing phase train no predictor
            assert name.startswith("dms_predictor") and phase is not Phase.SOFT
            assert all(one is None or not one.any() for one in (ours, wanted)), name
            continue
        torch.testing.assert_close(
            ours.double(), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def _attend_and_report(model: GPTModel, x: Tensor, record: Microbatch, alpha: Tensor) -> Tensor:
    """Attention whose account must hold the reference's decisions, before the lag and without padding."""
    found = attend(model, x, record)
    record.account.report(0, torch.arange(G), torch.zeros(2, G, T), torch.zeros(2, G, T), record.valid)
    evicted = ((alpha > 0.5) & record.valid[:, None]).sum(dim=(0, 2))
    assert record.account.evicted_per_head().tolist() == [[0] * G, evicted.tolist()]
    assert 0.1 < (alpha > 0.5).double().mean() < 0.9  # a true mixture, or this test shows little
    return found


def test_without_query_norm_and_bias() -> None:
    """The Llama family. Catches: a predictor that needs a q-norm."""
    dms = DMSConfig(**SETTINGS)
    model, record = build(dms, qk_layernorm=False, add_qkv_bias=False), microbatch(Phase.HARD)
    expected, alpha, _ = reference(in_fp64(model), hidden_states().double(), dms, record)
    found = _attend_and_report(model, hidden_states(), record, alpha)
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


def core(rank: int, ranks: int, granularity: str) -> DMSCoreAttention:
    """Layer 2's core attention on one tensor-parallel rank, of 4 KV heads in all."""
    tp = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    dms = DMSConfig(granularity=granularity, **SETTINGS)
    config = transformer_config(num_query_groups=H)
    mask_type = attention_module.AttnMaskType.causal
    return DMSCoreAttention(config, 2, mask_type, "self", dms, pg_collection=SimpleNamespace(tp=tp))


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_decisions_do_not_depend_on_ranks_or_batches(granularity: str) -> None:
    """Soft decisions of two tensor-parallel ranks, and of each sample alone, are those of one process, bit
    for bit. Catches noise by rank: a rank's own head numbers (0, 1) for the global ones (2, 3), the place
    in the microbatch for the sample's id."""
    raw = torch.randn(2, H, T, generator=torch.Generator().manual_seed(6))
    shape = ModelShape(LAYERS, H, LAYERS, None)

    def decide(rank: int, ranks: int, samples: tuple[int, ...]) -> Tensor:
        record = microbatch(Phase.SOFT, samples=samples)
        record.account = CompressionAccount(shape, 0.5, record.valid.sum(1).float(), 0.0)
        rows = [SAMPLES.index(sample) for sample in samples]
        return core(rank, ranks, granularity)._log_keep(raw[rows].chunk(ranks, dim=1)[rank], record)

    whole = decide(0, 1, SAMPLES)
    assert torch.equal(torch.cat([decide(rank, 2, SAMPLES) for rank in range(2)], dim=1), whole)
    for row, sample in enumerate(SAMPLES):
        assert torch.equal(decide(0, 1, (sample,)), whole[row : row + 1])


# Rows of [query, query, key, value] x 2 KV heads, D = 8 each: the last of each borrowed part.
ROWS = {"query_channel": [7, 39], "key_channel": [23, 55]}
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


def changed_rows(model: GPTModel, before: dict[str, Tensor]) -> dict[str, list[int]]:
    """Rows that are not bit for bit what they were, by parameter."""
    rows = {
        name: (p.detach() != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        if p.dim() > 1
        else (p.detach() != before[name]).nonzero().flatten().tolist()
        for name, p in model.named_parameters()
    }
    return {name: changed for name, changed in rows.items() if changed}


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(3))


def logits_of(model: GPTModel, record: Microbatch | None) -> Tensor:
    """Megatron's own attention needs the causal mask (True = hidden) on a CPU; DMS attention reads none."""
    hidden = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    return model(tokens(), torch.arange(T)[None].expand(2, -1), hidden, packed_seq_params=record)


@pytest.mark.parametrize(("predictor", "granularity"), [*BORROWED, ("linear", "head")])
def test_training_the_predictor_alone(predictor: str, granularity: str) -> None:
    """Two steps of Adam on a model frozen but for its predictor. Catches: a parameter or a row of the QKV
    weight that moves without being asked, a predictor that stays (Adam's momentum included), a layer left
    out."""
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
    """The zeroing phase with fade 1, and the dense spec with Megatron's own attention. Catches: a mask, a
    scale or a norm that the plug-in changes; parameter names that differ between student and teacher."""
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
