"""A small GPTModel with DMS attention, and the same attention in fp64 written from the text of the DMS
paper."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.ops.eviction import logistic_noise
from tests.support.merging_by_loop import merge_by_loop

LAYERS, HIDDEN, H, G, D, VOCAB, T = 2, 24, 4, 2, 8, 37, 11
PER_GROUP = H // G
BASE, EPSILON, SEED = 10000, 1e-3, 77
SAMPLES = (5, 2)
LENGTHS = (11, 7)
PREDICTORS = ("query_channel", "key_channel", "linear")
# Scale and offset of this size make decisions of random weights a true mixture.
SETTINGS = {"alpha_scale": 2.0, "alpha_offset": 0.3, "window": 3, "lag": 1, "temperature": 0.5}


@contextmanager
def one_process() -> Iterator[None]:
    """Make a process group of one and Megatron's parallel state; everything runs on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(CudaRNGStatesTracker, "fork", lambda self: nullcontext())  # for a dropout of 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def transformer_config(**changes: object) -> TransformerConfig:
    """Return a config of two layers with GQA, biases and norms of queries and keys."""
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
    """Build a model whose parameters are all random, norms and biases too; without DMS if `dms` is None."""
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
    """Return the record of a microbatch, as the forward step would make it."""
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
    """Return random hidden states [T, B, HIDDEN]."""
    return 2 * torch.randn(T, len(SAMPLES), HIDDEN, generator=torch.Generator().manual_seed(9))


def attend(model: GPTModel, x: Tensor, record: Microbatch, layer: int = 1) -> Tensor:
    """Return the output [T, B, HIDDEN] of one layer's attention."""
    rope = model.rotary_pos_emb(T)
    module = model.decoder.layers[layer].self_attention
    out, _ = module(x, None, rotary_pos_emb=(rope, rope), packed_seq_params=record)
    return out


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def rope(x: Tensor) -> Tensor:
    """Turn channels c and c + D/2 of token t of x [T, B, heads, D] by t / BASE ** (2 c / D)."""
    angle = torch.arange(T).double()[:, None] / BASE ** (2 * torch.arange(D // 2).double() / D)
    sin, cos = angle.sin()[:, None, None], angle.cos()[:, None, None]
    one, other = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def reference(
    weights: dict[str, Tensor], x: Tensor, dms: DMSConfig, record: Microbatch, layer: int = 1
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute attention in fp64.

    Returns the output [T, B, HIDDEN], the decisions before the lag [B, G, T], and the queries and keys
    that are attended.
    """
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
    if dms.method == "merge":
        raw_importance = torch.stack([q[:, :, g * PER_GROUP, -1] for g in range(G)], dim=-1)
        q_mask[[g * PER_GROUP for g in range(G)], -1] = record.fade
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

    if dms.method == "merge":
        importance = F.logsigmoid(dms.importance_scale * raw_importance - dms.importance_offset)
        means = merge_by_loop(*(x.permute(1, 2, 0, 3) for x in (k, v)), alpha, importance.permute(1, 2, 0))
        k, v = (x.permute(2, 0, 1, 3) for x in means)

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
    """Return the parameters of one layer's attention in fp64, as leaves that want gradients."""
    module = model.decoder.layers[layer].self_attention
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def check_attention_and_gradients(dms: DMSConfig, phase: Phase, fade: float) -> None:
    """Compare one layer's attention and its gradients with the reference."""
    model, record, x = build(dms), microbatch(phase, fade), hidden_states()
    weights = in_fp64(model)
    expected, alpha, _ = reference(weights, x.double(), dms, record)
    found = attend(model, x, record) if phase is Phase.ZEROING else attend_and_report(model, x, record, alpha)
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


def attend_and_report(model: GPTModel, x: Tensor, record: Microbatch, alpha: Tensor) -> Tensor:
    """Attend, and check that the account holds the reference's decisions before the lag, without padding."""
    found = attend(model, x, record)
    record.account.report(0, torch.arange(G), torch.zeros(2, G, T), torch.zeros(2, G, T), record.valid)
    evicted = ((alpha > 0.5) & record.valid[:, None]).sum(dim=(0, 2))
    assert record.account.evicted_per_head().tolist() == [[0] * G, evicted.tolist()]
    assert 0.1 < (alpha > 0.5).double().mean() < 0.9  # a true mixture, or this test shows little
    return found


def changed_rows(model: GPTModel, before: dict[str, Tensor]) -> dict[str, list[int]]:
    """Return the rows of each parameter that are no longer bit for bit what they were."""
    rows = {
        name: (p.detach() != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        if p.dim() > 1
        else (p.detach() != before[name]).nonzero().flatten().tolist()
        for name, p in model.named_parameters()
    }
    return {name: changed for name, changed in rows.items() if changed}


# Rows of [query, query, key, value] x 2 KV heads, D = 8 each: the last of each borrowed part.
ROWS = {"query_channel": [7, 39], "key_channel": [23, 55]}
