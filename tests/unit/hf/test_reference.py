"""The exported model against a second implementation of DMS, written here from its definition, in fp64.

`reference` shares nothing with the package or with transformers' attention: projections, RoPE, decisions, the
mask (as loops over pairs) and the MLP are spelled out, so that an error has to be made twice to go unseen.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms
from megatron_dms.hf.modeling_dms import LlamaForCausalLMDMS

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 3, 4, 2, 16, 64
WINDOWS_AND_LAGS = [(0, 0), (0, 1), (3, 0), (3, 1), (3, 3), (7, 0), (7, 1), (7, 7)]
SETTINGS = list(
    itertools.product(("query_channel", "linear", "key_channel"), ("head", "layer"), WINDOWS_AND_LAGS)
)


@pytest.fixture(autouse=True)
def one_thread():
    """For sizes this small a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(
    family: str, predictor="query_channel", granularity="head", window=3, lag=1, offset=-0.5, **changes
):
    """GQA, head size 16, three layers; scale and offset such that a good half of the pairs is evicted."""
    entries = config_entries(family, predictor, granularity, window, lag, 1.0, offset, 0.1, 4.0)
    family_changes = {"mistral": {"sliding_window": None}}.get(family, {})
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return CONFIG_MAPPING[family](**(sizes | family_changes | entries | changes))


def tiny_model(family: str = "qwen3", seed: int = 0, **settings):
    """A random model in fp32 whose attention is far from uniform and whose norms are not 1."""
    config = tiny_config(family, **settings)
    model = getattr(modeling_dms, MODEL_CLASSES[family])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """[batch, length], never the padding id 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class Reference(NamedTuple):
    logits: Tensor
    """[T, vocab] fp64."""
    decision: Tensor
    """[layers, KV heads, T] bool: what each token decides, about the pair `lag` tokens before it."""
    margin: float
    """Smallest |z|: if this is not far above rounding, a disagreement means nothing."""


def is_gone(decision_T: list[bool], key: int, query: int, window: int, lag: int) -> bool:
    """Whether `query` no longer sees `key` (DMS paper, section 3.2): too old, and decided to be evicted."""
    return query - key > window and decision_T[key + lag]


def held_pairs(decision_T: list[bool], tokens: int, window: int, lag: int) -> int:
    """Pairs one head holds once `tokens` are in: in the window, or not marked, or not decided yet."""
    last = tokens - 1
    return sum(last - k <= window or k + lag > last or not decision_T[k + lag] for k in range(tokens))


@torch.no_grad()
def reference(model, ids_T: Tensor) -> Reference:
    """One sequence through the whole model, in fp64."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    T, group = len(ids_T), QUERY_HEADS // KV_HEADS
    x = weights["model.embed_tokens.weight"][ids_T]
    half = HEAD_SIZE // 2
    rope_parameters = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    angle = torch.arange(T).double()[:, None] * rope_parameters["rope_theta"] ** (
        -torch.arange(half).double() / half
    )

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def norm(y: Tensor, name: str) -> Tensor:
        scaled = y / (y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return scaled * weights[name + ".weight"]

    def rotate(y: Tensor) -> Tensor:  # [T, D]
        a, b = y[:, :half], y[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    decisions, margin = [], float("inf")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        attn = name + "self_attn."
        h = norm(x, name + "input_layernorm")
        q, k, v = (linear(h, f"{attn}{part}_proj").view(T, -1, HEAD_SIZE).unbind(1) for part in "qkv")
        q, k, v = list(q), list(k), list(v)
        if attn + "q_norm.weight" in weights:
            q, k = [norm(y, attn + "q_norm") for y in q], [norm(y, attn + "k_norm") for y in k]
        if config.dms_predictor == "linear":
            raw = list(linear(norm(x, attn + "dms_proj_alpha_norm"), attn + "dms_proj_alpha").unbind(1))
        elif config.dms_predictor == "query_channel":
            raw = [q[g * group][:, -1].clone() for g in range(KV_HEADS)]
        else:
            raw = [k[g][:, -1].clone() for g in range(KV_HEADS)]
        if config.dms_alpha_per == "layer":
            raw = [raw[0]] * KV_HEADS
        z = torch.stack(raw) * config.dms_alpha_scale - config.dms_initial_alpha_offset
        margin = min(margin, float(z.abs().min()))
        decision = (z > 0).tolist()
        decisions.append(decision)

        lenders = range(KV_HEADS)  # also where only the first one's decision is used
        q_lent = [g * group for g in lenders] if config.dms_predictor == "query_channel" else []
        k_lent = list(lenders) if config.dms_predictor == "key_channel" else []
        for heads, lent in ((q, q_lent), (k, k_lent)):
            for i in range(len(heads)):
                keep = torch.ones(HEAD_SIZE).double()
                keep[-1] = 0.0 if i in lent else 1.0
                heads[i] = rotate(heads[i] * keep) * keep
        out = []
        for i, q_head in enumerate(q):
            g = i // group
            scores = q_head @ k[g].T / HEAD_SIZE**0.5
            for query, key in itertools.product(range(T), range(T)):
                if key > query or is_gone(decision[g], key, query, config.dms_window_size, config.dms_lag):
                    scores[query, key] = -float("inf")
            out.append(scores.softmax(-1) @ v[g])
        x = x + torch.cat(out, dim=1) @ weights[attn + "o_proj.weight"].T
        h = norm(x, name + "post_attention_layernorm")
        gate, up = (h @ weights[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[name + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm") @ weights["lm_head.weight"].T
    return Reference(logits, torch.tensor(decisions), margin)


FAMILIES_AND_SETTINGS = [
    *itertools.product(("qwen3", "llama"), SETTINGS),
    # what sets these apart is in their base models: one setting of each predictor shows it
    *itertools.product(
        ("mistral", "qwen2"), [setting for setting in SETTINGS if setting[1:] == ("head", (3, 1))]
    ),
]


@pytest.mark.parametrize(("family", "setting"), FAMILIES_AND_SETTINGS)
@torch.no_grad()
def test_forward_is_the_definition(family, setting):
    """Catches, in attention_dms.py and sparse_attention_dms.py: a window off by one, a lag in the wrong
    direction, a decision read after the zeroing or from another head, one of the two zeroings left out, the
    linear predictor fed with the normed input, `z > 0` turned around."""
    predictor, granularity, (window, lag) = setting
    model = tiny_model(family, predictor=predictor, granularity=granularity, window=window, lag=lag)
    ids_BT = random_tokens(2, 23)
    logits_BTV = model(ids_BT, use_cache=False).logits
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
        expected = reference(model, ids_T)
        assert expected.margin > 1e-5, "decision too close to call; change the seed"
        share = expected.decision.double().mean().item()
        assert 0.3 < share < 0.9, f"{share:.2f} of the decisions evict: the test would show little"
        difference = (logits_TV - expected.logits).abs().max().item()
        print(f"largest difference {difference:.1e}, evicted {share:.2f}")
        assert difference < 1e-4


@torch.no_grad()
def test_untrained_linear_predictor_is_the_base_model():
    """Catches dms_proj_alpha not starting at 0, and any change to attention where nothing is evicted."""
    torch.manual_seed(0)
    config = tiny_config("llama", predictor="linear", window=0, offset=0.0)  # evicts at any z > 0
    model = LlamaForCausalLMDMS(config).eval()
    base = LlamaForCausalLM(config).eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "dms_" not in k})
    ids_BT = random_tokens(2, 23)
    assert torch.allclose(model(ids_BT).logits, base(ids_BT).logits, atol=1e-6)
    assert model.last_kv_stats.achieved_cr == 1.0


@torch.no_grad()
def test_predictor_bias_follows_attention_bias():
    """Catches a bias of dms_proj_alpha missing or left out of the logit, where the attention has biases."""
    model = tiny_model("llama", predictor="linear", attention_bias=True)
    alpha = model.model.layers[1].self_attn.dms_proj_alpha
    assert alpha.bias is not None
    assert tiny_model("llama", predictor="linear").model.layers[1].self_attn.dms_proj_alpha.bias is None
    for layer in model.model.layers:
        layer.self_attn.dms_proj_alpha.bias.fill_(-100.0)
    model(random_tokens(1, 9))
    assert model.last_kv_stats.evicted_fraction == 0.0
