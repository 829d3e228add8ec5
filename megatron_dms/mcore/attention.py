"""DMS self-attention for Megatron-Core: predictor, eviction and core attention.

The raw value of a decision travels from the projections to the core attention as one more channel of the
value, which RoPE does not touch. (If pairs are merged, the raw value of the importance is a second further
channel.) So the raw value is an input like any other: recomputation of the core attention differentiates it,
and no state is kept between the two modules.

Shapes follow Megatron: T tokens, B samples, H query heads and G KV heads of this rank, D head size. Under
context parallelism, T is this rank's part of the sequence. Inside the core attention, T is the whole
sequence, and H and G are this rank's share of the heads (context_parallel.py).
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.kernels import AttentionBackend, attention_backend, backend_name
from megatron_dms.mcore.compression_account import attach_compression_loss
from megatron_dms.mcore.context_parallel import HeadExchange
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.mcore.predictor import BorrowedChannel, LinearPredictor, share_head_zero
from megatron_dms.ops.eviction import Eviction, hard_eviction, logistic_noise, shift, soft_eviction


class DMSSelfAttention(SelfAttention):
    """Megatron's self-attention, with keys and values that can be evicted or merged.

    `hidden_states` must be the residual stream before the input norm (see norms.py), and `packed_seq_params`
    must be a Microbatch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        dms: DMSConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        self.dms = dms
        self.borrowed = self.core_attention.borrowed
        if dms.predictor == "linear":
            self.dms_predictor = LinearPredictor(config, self.tp_group)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run SelfAttention.forward. `key_value_states` means nothing to self-attention, and is the only
        argument that Megatron passes on to get_query_key_value_tensors. So it carries the microbatch there.

        Raises:
            TypeError: `packed_seq_params` is not a Microbatch.
        """
        microbatch = kwargs.get("packed_seq_params")
        if not isinstance(microbatch, Microbatch):
            raise TypeError(
                f"DMS attention needs packed_seq_params to be a Microbatch, found {type(microbatch)}"
            )
        return super().forward(hidden_states, attention_mask, microbatch, *args, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Microbatch, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query [T, B, H, D], the key [T, B, G, D], and the value with the raw value of the
        decision and the further raw values of the compression method, [T, B, G, D + 1 + further]."""
        query, key, value = super().get_query_key_value_tensors(hidden_states, None, *args, **kwargs)
        further = self.dms.compression_method.read_further_values(self.borrowed.read_query(query))
        if self.dms.predictor == "linear":
            raw = self.dms_predictor(hidden_states)
        else:
            raw = self.borrowed.read(query, key)
            query, key = self.borrowed.fade(query, key, key_value_states.fade)
        if self.dms.granularity == "layer":
            raw = share_head_zero(raw, self.tp_group)
        return query, key, torch.cat([value, torch.stack([raw, *further], dim=-1)], dim=-1)


class DMSCoreAttention(MegatronModule):
    """Decide which pairs are evicted, and attend to the others: the region of selective recomputation."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        dms: DMSConfig,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"DMS needs causal self-attention, found {attention_type} attention, {attn_mask_type}"
            )
        tp_size, tp_rank = pg_collection.tp.size(), pg_collection.tp.rank()
        self.dms = dms
        self.layer = layer_number - 1  # Megatron counts from 1
        self.scale = softmax_scale
        groups = config.num_query_groups // tp_size
        self.exchange = HeadExchange(pg_collection.cp, groups)
        self.first_group = tp_rank * groups + self.exchange.first_group
        self.borrowed = BorrowedChannel(dms, config.num_attention_heads // tp_size, groups)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: Microbatch,
    ) -> Tensor:
        """Return the attention output, [T, B, H * D].

        Args:
            query, key: [T, B, H, D] and [T, B, G, D], after RoPE.
            value: [T, B, G, D + 1 + further], as get_query_key_value_tensors returns it.
            attention_mask: not used. The mask is causal, padding is on the right, and DMS makes the rest.
            packed_seq_params: the microbatch.
        """
        if self.dms.zeroing == "around_rope":  # RoPE has mixed channel D/2 - 1 into the borrowed channel
            query, key = self.borrowed.fade(query, key, packed_seq_params.fade)
        query, key, value = self.exchange.to_whole_sequence(query, key, value)
        value, raw, further = self._unpack(value)
        decided = self._decide(raw, packed_seq_params)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, T, D]
        k, v = self.dms.compression_method.pairs_to_attend(k, v, decided.alpha, further, self.dms)
        log_keep = shift(decided.log_keep, self.dms.lag)
        out = self._backend(q.device)(q, k, v, log_keep, self.dms.window, self.scale)
        return self.exchange.to_own_tokens(out.permute(2, 0, 1, 3)).flatten(2)

    def _backend(self, device: torch.device) -> AttentionBackend:
        name = backend_name(self.dms.attention_backend, device)
        options = {"threshold": self.dms.attention_threshold} if name == "triton" else {}
        return attention_backend(name, **options)

    def _unpack(self, value: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Separate the value from what its last channels carried: the decision's raw value, and the further
        raw values of the compression method, [B, G, T] each."""
        carried = 1 + self.dms.compression_method.further_values
        raw, *further = (x.permute(1, 2, 0) for x in value[..., -carried:].unbind(-1))
        return value[..., :-carried], raw, further

    def _decide(self, raw: Tensor, microbatch: Microbatch) -> Eviction:
        """Return the decisions, not yet shifted by the lag, and report them to the compression account.

        raw: [B, G, T].
        """
        account = microbatch.account
        if account is None:  # the zeroing phase
            nothing = torch.zeros_like(raw, dtype=torch.float32)
            return Eviction(nothing, nothing, nothing)
        logits = self.dms.alpha_scale * raw.float() - self.dms.alpha_offset
        heads = self.first_group + torch.arange(self.exchange.groups, device=raw.device)
        if microbatch.phase is Phase.HARD:
            eviction = hard_eviction(logits)
        else:
            eviction = soft_eviction(logits, self._noise(heads, microbatch), self.dms.temperature)
        counted = microbatch.valid if self.exchange.counts else torch.zeros_like(microbatch.valid)
        account.report(self.layer, heads, eviction.alpha, eviction.hard, counted)
        if microbatch.phase is Phase.HARD:
            return eviction
        attached = attach_compression_loss(eviction.log_keep, eviction.alpha, counted, account)
        return eviction._replace(log_keep=attached)

    def _noise(self, heads: Tensor, microbatch: Microbatch) -> Tensor:
        """Return the noise, [B, G, T], or [B, 1, T] with head 0's noise if a layer makes one decision."""
        if self.dms.granularity == "layer":
            heads = torch.zeros(1, dtype=heads.dtype, device=heads.device)
        tokens = torch.arange(microbatch.valid.shape[1], device=heads.device)
        return logistic_noise(microbatch.seed, microbatch.sample_ids, self.layer, heads, tokens)
