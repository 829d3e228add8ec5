"""Plain models for the tests of the baselines, and the baselines' methods written a second time from their
papers.

`reference` runs in fp64 and shares nothing with the package: the whole decoder is spelled out, and the
pairs of a KV head are a Python list of positions. The methods drop pairs in the order of the papers, after
a query has read. The package drops them before the next pair is written.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_dms_models import draw_weights

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 2, 6, 2, 8, 61
GROUP = QUERY_HEADS // KV_HEADS


def save_plain(folder: Path, family: str = "qwen3", seed: int = 0, **changes: object) -> Path:
    """Save a random checkpoint whose attention is far from uniform and whose norms are not 1."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    sliding = {"sliding_window": None} if family == "mistral" else {}
    if family == "qwen2":  # takes no head_dim
        sizes |= {"hidden_size": QUERY_HEADS * HEAD_SIZE}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(sizes | sliding | changes)))
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return folder


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return token ids [batch, length]; none of them is the padding id 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*prompts: Tensor) -> dict[str, Tensor]:
    """Return input_ids and attention_mask of prompts [T_i]."""
    width = max(map(len, prompts))
    pad = [torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts]
    mask = [torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
    return {"input_ids": torch.stack(pad), "attention_mask": torch.stack(mask)}


class Reference(NamedTuple):
    """What the methods give for one sequence."""

    logits: Tensor
    """[T, vocab] fp64; a query of the prompt sees every pair before it."""
    reads: Tensor
    """[layers, KV heads, T]: pairs (and summaries) that each query reads."""
    margin: float
    """Least gap between what was dropped (or left unread) and the next worst, as a part of the latter:
    rounding must stay below it."""


def budget(tokens: int, cr: float) -> int:
    return max(1, math.ceil(tokens / cr))


@torch.no_grad()
def reference(
    model: PreTrainedModel, ids_T: Tensor, prompt: int, new: int, method: str, cr: float
) -> Reference:
    """Run one sequence whose first `prompt` tokens are the prompt; `new` tokens may follow them."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    T, half, k = len(ids_T), HEAD_SIZE // 2, budget(prompt + new, cr)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    rates = rope["rope_theta"] ** (-torch.arange(half).double() / half)
    angle = torch.arange(T).double()[:, None] * rates

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def norm(y: Tensor, name: str) -> Tensor:
        if name + ".weight" not in weights:  # Llama's heads have no norm
            return y
        scaled = y / (y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return scaled * weights[name + ".weight"]

    def rotate(y: Tensor) -> Tensor:
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    x = weights["model.embed_tokens.weight"][ids_T]
    reads, margin = torch.zeros(LAYERS, KV_HEADS, T), math.inf
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        y = norm(x, name + "input_layernorm")
        q, key, value = (
            linear(y, f"{name}self_attn.{p}_proj").view(T, -1, HEAD_SIZE).transpose(0, 1) for p in "qkv"
        )
        q = rotate(norm(q, name + "self_attn.q_norm"))
        key = rotate(norm(key, name + "self_attn.k_norm"))
        out, margin_here = attend(q, key, value, prompt, k, method, cr, reads[layer])
        margin = min(margin, margin_here)
        x = x + linear(out.transpose(0, 1).reshape(T, -1), name + "self_attn.o_proj")
        y = norm(x, name + "post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(y, name + "mlp.gate_proj"))
        x = x + linear(gate * linear(y, name + "mlp.up_proj"), name + "mlp.down_proj")
    return Reference(linear(norm(x, "model.norm"), "lm_head"), reads, margin)


def attend(
    q: Tensor, key: Tensor, value: Tensor, prompt: int, k: int, method: str, cr: float, reads: Tensor
) -> tuple[Tensor, float]:
    """Attend with one query after the other, and fill reads [G, T].

    q is [H, T, D]; key and value are [G, T, D].
    """
    H, T, D = q.shape
    out, margin = torch.zeros_like(q), math.inf
    held = [[] for _ in range(KV_HEADS)]
    total = torch.zeros(KV_HEADS, T).double()
    size = min(16, int(2 * cr))
    sinks = min(4, k // 2)
    recent = k - k // 2
    for i in range(T):
        in_prompt = i < prompt
        weight_HT = torch.zeros(H, T).double()
        for g in range(KV_HEADS):
            held[g].append(i)
            seen = list(held[g])
            reads[g, i] = len(seen)
            queries = range(g * GROUP, (g + 1) * GROUP)
            if method == "quest" and not in_prompt:
                seen, reads[g, i], gap = quest_pages(
                    q[queries, i], key[g, : i + 1], size, math.ceil(k / size)
                )
                margin = min(margin, gap)
            for h in queries:
                weight_HT[h, seen] = (key[g, seen] @ q[h, i] * D**-0.5).softmax(0)
                out[h, i] = weight_HT[h, seen] @ value[g, seen]
            total[g] += weight_HT[queries].mean(0)
        if i < prompt - 1 or method in ("vanilla", "quest"):
            continue
        for g in range(KV_HEADS):
            while len(held[g]) > k - 1:
                if method == "window":
                    worth = {j: j for j in held[g] if j >= sinks}
                elif method == "tova":
                    worth = {j: float(weight_HT[:, j].mean()) for j in held[g]}
                else:
                    worth = {j: float(total[g, j]) for j in held[g] if j <= i + 1 - recent}
                worst, *others = sorted(worth, key=worth.get)
                if others:
                    margin = min(margin, 1 - worth[worst] / worth[others[0]])
                held[g].remove(worst)
    return out, margin


def quest_pages(q_RD: Tensor, key_JD: Tensor, size: int, wanted: int) -> tuple[list[int], int, float]:
    """Return the positions to read, the reads, and the gap between the last page chosen and the next one."""
    J = len(key_JD)
    pages = [list(range(start, min(start + size, J))) for start in range(0, J, size)]
    bound = torch.zeros(len(q_RD), len(pages)).double()
    for r, q_D in enumerate(q_RD):
        for p, page in enumerate(pages):
            low, high = key_JD[page].min(0).values, key_JD[page].max(0).values
            bound[r, p] = torch.maximum(q_D * low, q_D * high).sum() * len(q_D) ** -0.5
    share = bound.softmax(1).mean(0)[:-1].tolist()
    order = sorted(range(len(share)), key=lambda p: -share[p])
    chosen = sorted(order[: wanted - 1]) + [len(pages) - 1]
    seen = [j for p in chosen for j in pages[p]]
    if len(pages) + len(seen) >= J:
        return list(range(J)), J, math.inf
    gap = 1 - share[order[wanted - 1]] / share[order[wanted - 2]] if wanted > 1 else math.inf
    return seen, len(pages) + len(seen), gap
