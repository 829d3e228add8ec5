"""A model that merges pairs (DMC, see ops/merging.py) with a cache that really merges them, for comparison.

    model = load_dmc(Path("out/merged"), "float32", "cpu")
    model.generate(**inputs)
    model.last_kv_stats.achieved_cr  # tokens / slots

Merging is eviction from accumulations: with a window of 0 and a lag of 1, the pair that DMS would drop is the
accumulation that the next one has taken in, and the next one gets its slot. So everything of an exported DMS
model serves here, prefill, pages, batches, padding and meter; what is added is the running mean of each KV
head's last slot, kept in fp32 at least.

Shapes: B sequences, H query heads, G KV heads, T new tokens, D head size.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.hf import MODEL_CLASSES, modeling_dms
from megatron_dms.hf.attention_dms import DMSAttention
from megatron_dms.hf.cache_dms import DMSCache
from megatron_dms.hf.cache_layer_dms import DMSCacheLayer
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.hf.sparse_attention_dms import NewTokens
from megatron_dms.hf.stats_dms import KVMeter
from megatron_dms.inference.loading import check_exported, load_weights
from megatron_dms.ops.merging import merge_pairs

NO_IMPORTANCE = -1e9
"""Log importance of padding: exp of it is 0, and unlike -inf it is a number."""


class Decisions(NamedTuple):
    """What new tokens decide, each [B, G, T]."""

    merge: Tensor
    """bool: into the slot before."""
    log_importance: Tensor
    """fp32."""


class Running(NamedTuple):
    """The accumulation in each KV head's last slot, in fp32 at least."""

    k_BG1D: Tensor
    v_BG1D: Tensor
    log_weight_BG1: Tensor
    """log z."""


def accumulate(
    k_BGTD: Tensor, v_BGTD: Tensor, decided: Decisions, new: NewTokens, before: Running | None
) -> tuple[Tensor, Tensor, Running]:
    """The accumulations of new tokens, and that of the last of them.

    Args:
        k_BGTD, v_BGTD: keys after RoPE, values.
        before: that of the last token before; None where none has come.

    Returns:
        k' and v' in the types of k and v (meaningless at padding), and what to go on from.
    """
    work = torch.promote_types(k_BGTD.dtype, torch.float32)
    first_k, first_v = k_BGTD[:, :, :1].to(work), v_BGTD[:, :, :1].to(work)
    if before is None:
        zero_BG1 = first_k.new_zeros(first_k.shape[:3])
        before = Running(torch.zeros_like(first_k), torch.zeros_like(first_v), zero_BG1)
    position_B1T = new.position_BT[:, None]
    # Padding hands on what was there: merged, with no weight.
    merge_BGT = (decided.merge & (position_B1T > 0)) | (position_B1T < 0)
    log_importance_BGT = decided.log_importance.to(work).masked_fill(position_B1T < 0, NO_IMPORTANCE)
    alpha = torch.cat([torch.zeros_like(before.log_weight_BG1), merge_BGT.to(work)], dim=2)
    log_importance = torch.cat([before.log_weight_BG1, log_importance_BGT], dim=2)
    k = torch.cat([before.k_BG1D, k_BGTD.to(work)], dim=2)
    v = torch.cat([before.v_BG1D, v_BGTD.to(work)], dim=2)
    k, v = merge_pairs(k, v, alpha, log_importance)
    run = (alpha == 0).cumsum(dim=2)
    log_weight_BG1 = log_importance.masked_fill(run != run[..., -1:], -torch.inf).logsumexp(2, keepdim=True)
    running = Running(*(x.detach() for x in (k[:, :, -1:], v[:, :, -1:], log_weight_BG1)))
    return k[:, :, 1:].to(k_BGTD.dtype), v[:, :, 1:].to(v_BGTD.dtype), running


class DMCAttention(DMSAttention):
    """Attention in which each KV head merges the pairs that its keys mark."""

    def decide(self, q_BHTD: Tensor, k_BGTD: Tensor, residual: Tensor | None) -> Decisions:
        """As DMSAttention.decide, with the importances; they travel together to `store_and_attend`."""
        raw_BGT = q_BHTD[:, self.borrowed_query_heads, :, -1].float()
        settings = self.settings
        return Decisions(
            super().decide(q_BHTD, k_BGTD, residual),
            F.logsigmoid(settings.importance_scale * raw_BGT - settings.importance_offset),
        )

    def _without_borrowed(self, q_BHTD: Tensor, k_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        q_BHTD, k_BGTD = super()._without_borrowed(q_BHTD.clone(), k_BGTD)
        q_BHTD[:, self.borrowed_query_heads, :, -1].zero_()
        return q_BHTD, k_BGTD

    def store_and_attend(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        decided: Decisions,
        new: NewTokens,
        meter: KVMeter,
        cache: DMSCache | None,
    ) -> Tensor:
        """As DMSAttention.store_and_attend, of accumulations."""
        store = None if cache is None else cache.layers[self.layer_idx]
        before = None if store is None else store.running
        k_BGTD, v_BGTD, running = accumulate(k_BGTD, v_BGTD, decided, new, before)
        if store is not None:
            store.running = running
        return super().store_and_attend(q_BHTD, k_BGTD, v_BGTD, decided.merge, new, meter, cache)


class DMCCacheLayer(DMSCacheLayer):
    """The slots of one attention layer, and the accumulation in each head's last one."""

    def _forget_everything(self) -> None:
        super()._forget_everything()
        self.running: Running | None = None

    @property
    def bookkeeping_bytes(self) -> int:
        running = () if self.running is None else self.running
        return super().bookkeeping_bytes + sum(part.nbytes for part in running)

    def select_sequences(self, index: Tensor) -> None:
        super().select_sequences(index)
        if self.running is not None:
            self.running = Running(*(part.index_select(0, index.to(part.device)) for part in self.running))


class SlotMeter(KVMeter):
    """The achieved CR is tokens / slots: a sequence's first token counts as one that was not merged."""

    def start_forward(self, before_B: Tensor, count_B: Tensor, lag: int, num_heads: int) -> None:
        super().start_forward(before_B, count_B, 0, num_heads)


class DMCCache(DMSCache):
    """The cache that merges."""

    def __init__(self, num_layers: int, settings: DMSSettings, attend_with: str) -> None:
        """`attend_with` is a name in PAGE_ATTENTION."""
        super().__init__(num_layers, settings.window, settings.lag, attend_with)
        self.layers = [DMCCacheLayer(settings.window, settings.lag, attend_with) for _ in range(num_layers)]

    def _start_anew(self) -> None:
        super()._start_anew()
        self.meter = SlotMeter(len(self.layers))


class DMCForCausalLM(modeling_dms.DMSForCausalLM):
    """Mixin that goes before an exported DMS class, and makes it merge."""

    _attention_class = DMCAttention
    _meter_class = SlotMeter

    @staticmethod
    def _read_settings(config: Any) -> DMSSettings:
        if getattr(config, "dms_method", DMSSettings.method) == "evict":  # before what only merging has
            raise ValueError(
                "dms_method in config.json is 'evict', expected 'merge': this model evicts pairs; load it "
                "with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
            )
        return DMSSettings.from_entries(vars(config))

    def make_cache(self) -> DMCCache:
        """An empty cache for this model, to pass as past_key_values and keep."""
        return DMCCache(len(self.model.layers), self.dms_settings, self.page_attention)

    def graphed_step(self, cache: DMSCache) -> None:
        raise NotImplementedError("decode steps of a model that merges pairs cannot be a CUDA graph")


def load_dmc(folder: Path, dtype: str, device: str) -> Any:
    """The exported model of a run with --dms-method merge, in evaluation mode. Runs no code of the folder.

    Args:
        dtype: "auto" (the one that config.json names), "float32", "bfloat16" or "float16".
        device: as torch names it.

    Raises:
        ValueError: not an exported model that merges pairs, or its weights do not fit its config.
    """
    from transformers import AutoConfig

    check_exported(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    DMCForCausalLM._read_settings(config)
    return load_weights(merging_class(config.model_type), folder, dtype, device)


def merging_class(model_type: str) -> Any:
    """The class of a model type, a key of MODEL_CLASSES.

    Raises:
        ValueError: there is none.
    """
    if model_type not in MODEL_CLASSES:
        raise ValueError(f"model_type is {model_type!r}, expected one of {sorted(MODEL_CLASSES)}")
    exported = getattr(modeling_dms, MODEL_CLASSES[model_type])
    return type(exported.__name__.replace("DMS", "DMC"), (DMCForCausalLM, exported), {})
