"""A second implementation of DMS, written from its definition, in fp64.

`reference` shares nothing with the package or with transformers' attention: projections, RoPE, decisions, the
mask (as loops over pairs) and the MLP are spelled out, so that an error has to be made twice to go unseen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_dms_models import HEAD_SIZE, KV_HEADS, LAYERS, QUERY_HEADS


class Reference(NamedTuple):
    """What the definition gives for one sequence."""

    logits: Tensor
    """[T, vocab] fp64."""
    decision: Tensor
    """[layers, KV heads, T] bool: what each token decides, about the pair `lag` tokens before it."""
    margin: float
    """Smallest |z|: if this is not far above rounding, a disagreement means nothing."""


def is_gone(decision_T: list[bool], key: int, query: int, window: int, lag: int) -> bool:
    """Say whether `query` no longer sees `key`: too old, and evicted (DMS paper, section 3.2)."""
    return query - key > window and decision_T[key + lag]


def held_pairs(decision_T: list[bool], tokens: int, window: int, lag: int) -> int:
    """Count the pairs that a head holds after `tokens`: in the window, not marked, or not decided yet."""
    last = tokens - 1
    return sum(last - k <= window or k + lag > last or not decision_T[k + lag] for k in range(tokens))


@torch.no_grad()
def reference(model: PreTrainedModel, ids_T: Tensor) -> Reference:
    """Run one sequence through the whole model, in fp64."""
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
                again = keep if getattr(config, "dms_zeroing", "around_rope") == "around_rope" else 1.0
                heads[i] = rotate(heads[i] * keep) * again
        rows, settings = range(T), (config.dms_window_size, config.dms_lag)
        hidden = [
            [[key > query or is_gone(head, key, query, *settings) for key in rows] for query in rows]
            for head in decision
        ]
        out = []
        for i, q_head in enumerate(q):
            g = i // group
            scores = q_head @ k[g].T / HEAD_SIZE**0.5
            scores = scores.masked_fill(torch.tensor(hidden[g]), -float("inf"))
            out.append(scores.softmax(-1) @ v[g])
        x = x + torch.cat(out, dim=1) @ weights[attn + "o_proj.weight"].T
        h = norm(x, name + "post_attention_layernorm")
        gate, up = (h @ weights[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[name + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm") @ weights["lm_head.weight"].T
    return Reference(logits, torch.tensor(decisions), margin)
