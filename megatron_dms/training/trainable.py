"""The trainable parameters (--dms-train), and the zeroing of a borrowed channel's weights.

linear_qkv interleaves its rows by KV head. Each of this rank's G groups has the rows of its query heads, then
of its key, then of its value, D rows each.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.attention import DMSSelfAttention


def freeze_all_but_predictor(model: GPTModel, dms: DMSConfig) -> None:
    """Freeze all but the predictor: its own parameters, or the borrowed rows of the QKV projection."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for attention in dms_attentions(model):
        if dms.predictor == "linear":
            attention.dms_predictor.requires_grad_(True)
        else:
            for parameter, rows in borrowed_rows(attention, dms):
                _train_rows_only(parameter, rows)
    if model.pre_process:
        # Reentrant checkpointing (full recompute) builds no graph unless an input requires a gradient.
        model.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(out.is_leaf))


def _train_rows_only(parameter: torch.nn.Parameter, rows: Tensor) -> None:
    """Set the gradient of all other rows to zero.

    Adam then leaves these rows exactly as they are, as checks.py refuses weight decay.
    """
    mask = torch.zeros(parameter.shape[0], *[1] * (parameter.dim() - 1))
    mask[rows] = 1
    parameter.requires_grad_(True)
    parameter.register_hook(lambda grad: grad * mask.to(grad))


def dms_attentions(model: torch.nn.Module) -> list[DMSSelfAttention]:
    """Return the DMS attention modules of this stage, in order."""
    return [module for module in model.modules() if isinstance(module, DMSSelfAttention)]


def borrowed_rows(attention: DMSSelfAttention, dms: DMSConfig) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Return a layer's QKV weight, and bias if it has one, each with the numbers of its borrowed rows on this
    rank."""
    groups = attention.num_query_groups_per_partition
    queries_per_group = attention.num_attention_heads_per_partition // groups
    head_size = attention.hidden_size_per_attention_head
    block = queries_per_group + 2  # the heads of one group in the interleaved rows
    channel = attention.borrowed
    places = [0] * channel.of_query + [queries_per_group] * channel.of_key  # the key follows the query heads
    rows = [(group * block + place + 1) * head_size - 1 for group in range(groups) for place in places]
    found = [attention.linear_qkv.weight]
    if getattr(attention.linear_qkv, "bias", None) is not None and attention.linear_qkv.bias.numel():
        found.append(attention.linear_qkv.bias)
    return [(parameter, torch.tensor(rows, dtype=torch.long)) for parameter in found]


@torch.no_grad()
def zero_borrowed_rows(model: torch.nn.Module, dms: DMSConfig) -> None:
    """Set the weights of the borrowed channels to zero, so that every eviction logit is -alpha_offset. If
    pairs are merged, all importances become equal."""
    for attention in dms_attentions(model):
        for parameter, rows in borrowed_rows(attention, dms):
            parameter[rows.to(parameter.device)] = 0
