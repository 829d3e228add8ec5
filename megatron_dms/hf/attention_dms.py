"""DMS attention for every model family with q/k/v/o projections, optional q/k norms and RoPE.

The module takes over the projections and norms of the family's own attention module under their names, so
that the state dict stays that of the base model. Only the linear predictor adds parameters, under NVIDIA's
names.

Shapes: B sequences, H query heads, G KV heads, T new tokens, D head size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Half-rotation RoPE is the same function for every family served here; cos and sin come from the model.
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache_dms import CACHE_NAME, DMSCache
from .cache_layer_dms import fresh_pairs
from .configuration_dms import DMSSettings
from .sparse_attention_dms import NewTokens, attend
from .stats_dms import KVMeter


class DMSStep(NamedTuple):
    """What one forward of the model passes to each attention layer, as the keyword `dms_step`."""

    new: NewTokens
    meter: KVMeter
    copies: int = 1
    """The number of rows of the caller's batch that each row of this forward stands for; see fork_dms.py."""


class DMSAttention(nn.Module):
    """Attention in which each KV head forgets the pairs its predictor marks, once they leave the window."""

    def __init__(self, base: Any, settings: DMSSettings, norm_class: type[nn.Module]) -> None:
        """
        Args:
            base: the family's attention module, such as a LlamaAttention; its parameters move into this one.
            settings: the checked DMS settings.
            norm_class: the family's RMSNorm, for the linear predictor.
        """
        super().__init__()
        config = base.config
        self.settings = settings
        self.layer_idx: int = base.layer_idx
        self.head_dim: int = base.head_dim
        self.scaling: float = base.scaling
        self.attention_dropout: float = base.attention_dropout
        self.q_proj: nn.Linear = base.q_proj
        self.k_proj: nn.Linear = base.k_proj
        self.v_proj: nn.Linear = base.v_proj
        self.o_proj: nn.Linear = base.o_proj
        self.q_norm: nn.Module = getattr(base, "q_norm", nn.Identity())  # Qwen3 has norms here, Llama has not
        self.k_norm: nn.Module = getattr(base, "k_norm", nn.Identity())
        groups: int = config.num_key_value_heads
        self.deciding_groups = groups if settings.granularity == "head" else 1
        if settings.predictor == "linear":
            self.dms_proj_alpha = nn.Linear(config.hidden_size, groups, bias=self.q_proj.bias is not None)
            for parameter in self.dms_proj_alpha.parameters():
                nn.init.zeros_(parameter)  # untrained: z = -offset, nothing is evicted
            self.dms_proj_alpha_norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        # The last channel of the first query head of each group (or of each key) is lent to decisions and
        # takes no part in attention. With one decision per layer only the first group's channel is read, but
        # every group lends its channel all the same, as in NVIDIA's released code.
        self.borrowed_query_heads = slice(None, None, config.num_attention_heads // groups)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        dms_step: DMSStep | None = None,
        dms_residual: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """
        Args:
            hidden_states: [B, T, hidden], after the layer's input norm.
            position_embeddings: cos and sin, [B or 1, T, D].
            attention_mask: not read; dms_step says what is padding.
            dms_step: comes from the model's pre-forward hook (see modeling_dms.py).
            dms_residual: [B, T, hidden], the residual stream before the input norm, which the linear
                predictor reads.
            kwargs: transformers' other arguments, of which CACHE_NAME is read: the cache to read and extend,
                or None.

        Returns:
            [B, T, hidden], and None where transformers expects attention weights.
        """
        if dms_step is None:
            raise ValueError("dms_step is missing: call the model (or model.model), not a layer of it")
        B, T, _ = hidden_states.shape
        heads = (B, T, -1, self.head_dim)
        q_BHTD = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        k_BGTD = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        v_BGTD = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        out_BHTD = self.decide_and_attend(
            q_BHTD, k_BGTD, v_BGTD, dms_residual, position_embeddings, dms_step, kwargs.get(CACHE_NAME)
        )
        return self.o_proj(out_BHTD.transpose(1, 2).reshape(B, T, -1)), None

    def decide_and_attend(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        residual: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        step: DMSStep,
        cache: DMSCache | None,
    ) -> Tensor:
        """[B, H, T, D]: the attention of the new queries, from queries and keys before RoPE.

        Args:
            residual, position_embeddings, step, cache: as in `forward`.
        """
        evict_BGT = self.decide(q_BHTD, k_BGTD, residual)
        q_BHTD, k_BGTD = self.rotate(q_BHTD, k_BGTD, position_embeddings)
        new = step.new.to(q_BHTD.device)
        return self.store_and_attend(q_BHTD, k_BGTD, v_BGTD, evict_BGT, new, step.meter, cache)

    def store_and_attend(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        evict_BGT: Tensor,
        new: NewTokens,
        meter: KVMeter,
        cache: DMSCache | None,
    ) -> Tensor:
        """Store the new pairs in the cache, if there is one, and attend; the meter counts both.

        Args:
            q_BHTD, k_BGTD: after RoPE.
            evict_BGT: bool, as `decide` returns it.

        Returns:
            [B, H, T, D], the attention of the new queries.
        """
        layer = self.layer_idx
        carries_BT = new.position_BT >= self.settings.lag  # padding, at position -1, carries no decision
        meter.record_decisions(layer, (evict_BGT & carries_BT[:, None]).sum(dim=2))
        dropout = self.attention_dropout if self.training else 0.0
        if cache is None:
            fresh = fresh_pairs(k_BGTD, v_BGTD, evict_BGT, new, self.settings.lag)
            return attend(q_BHTD, fresh, new, self.settings.window, self.scaling, dropout)
        store = cache.layers[layer]
        # Attention over pages has neither dropout nor a gradient, not even for the pair of this token.
        by_pages = not dropout and not (torch.is_grad_enabled() and q_BHTD.requires_grad)
        pairs = store.extend(k_BGTD, v_BGTD, evict_BGT, new, by_pages)
        bytes_per_pair = sum(x.shape[-1] * x.element_size() for x in (k_BGTD, v_BGTD))
        meter.record_storage(layer, store.held_BG, bytes_per_pair, store.kv_bytes, store.bookkeeping_bytes)
        if pairs is None:
            return store.attend(q_BHTD, self.scaling)
        return attend(q_BHTD, pairs, new, self.settings.window, self.scaling, dropout)

    def decide(self, q_BHTD: Tensor, k_BGTD: Tensor, residual: Tensor | None) -> Tensor:
        """The decision that each token carries: evict where z = scale * raw - offset > 0, in fp32.

        Args:
            q_BHTD, k_BGTD: after the q- and k-norm, before RoPE, with the borrowed channels still in place.
            residual: [B, T, hidden] before the layer's input norm (linear predictor only).

        Returns:
            [B, G, T] bool.
        """
        settings = self.settings
        groups = k_BGTD.shape[1]
        if settings.predictor == "query_channel":
            raw_BGT = q_BHTD[:, self.borrowed_query_heads, :, -1]
        elif settings.predictor == "key_channel":
            raw_BGT = k_BGTD[..., -1]
        else:
            raw_BGT = self.dms_proj_alpha(self.dms_proj_alpha_norm(residual)).transpose(1, 2)
        z_BdT = settings.alpha_scale * raw_BGT[:, : self.deciding_groups].float() - settings.alpha_offset
        evict_BdT = z_BdT > 0
        if settings.disable_eviction:
            evict_BdT = torch.zeros_like(evict_BdT)
        return evict_BdT.expand(-1, groups, -1)

    def rotate(
        self, q_BHTD: Tensor, k_BGTD: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys after RoPE, with the borrowed channels at 0.

        The borrowed channel is 0 before RoPE, or the decision would leak into channel D/2-1. It is set to 0
        again after RoPE, which mixes channel D/2-1 back into it, unless the settings say "before_rope".
        """
        q_BHTD, k_BGTD = self.without_borrowed(q_BHTD, k_BGTD)
        q_BHTD, k_BGTD = apply_rotary_pos_emb(q_BHTD, k_BGTD, *position_embeddings)
        if self.settings.zeroing == "before_rope":
            return q_BHTD, k_BGTD
        return self.without_borrowed(q_BHTD, k_BGTD)

    def without_borrowed(self, q_BHTD: Tensor, k_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with the borrowed channels at 0; a tensor that lends none is returned as it is."""
        if self.settings.predictor == "query_channel":
            q_BHTD = q_BHTD.clone()
            q_BHTD[:, self.borrowed_query_heads, :, -1].zero_()
        elif self.settings.predictor == "key_channel":
            k_BGTD = k_BGTD.clone()
            k_BGTD[..., -1].zero_()
        return q_BHTD, k_BGTD


def hand_down_residual(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a decoder layer: pass the layer's residual stream to its attention."""
    residual = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"dms_residual": residual}


def install_attention(
    decoder_layers: nn.ModuleList, settings: DMSSettings, attention_class: type[DMSAttention]
) -> None:
    """Replace the attention of every decoder layer, keeping its parameters and their names."""
    for layer in decoder_layers:
        norm_class = type(layer.get_submodule("input_layernorm"))
        layer.self_attn = attention_class(layer.self_attn, settings, norm_class)
        if settings.predictor == "linear":
            layer.register_forward_pre_hook(hand_down_residual, with_kwargs=True)
