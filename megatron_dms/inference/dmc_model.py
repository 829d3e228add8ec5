"""A model that merges pairs (DMC, see ops/merging.py), with a cache that really merges them, for comparison.

    model = load_dmc(Path("out/merged"), "float32", "cpu")
    model.generate(**inputs)
    model.last_kv_stats.achieved_cr  # tokens / slots

Merging is the eviction of accumulations. With a window of 0 and a lag of 1, the pair that DMS would drop is
an accumulation that the next token has taken in, and the next accumulation gets its slot. Everything of an
exported DMS model is therefore used unchanged: prefill, pages, batches, padding and meter. This file adds the
running mean of each KV head's last slot, kept in fp32 at least.

Shapes: B sequences, H query heads, G KV heads, T new tokens, D head size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.hf import MODEL_CLASSES, base_model_type, modeling_dms
from megatron_dms.hf.attention_dms import DMSAttention, DMSStep
from megatron_dms.hf.cache_dms import DMSCache
from megatron_dms.hf.cache_layer_dms import DMSCacheLayer
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.hf.sparse_attention_dms import NewTokens
from megatron_dms.hf.stats_dms import KVMeter
from megatron_dms.inference.checkpoints import read_config
from megatron_dms.inference.loading import check_exported, load_weights
from megatron_dms.ops.merging import merge_pairs

NO_IMPORTANCE = -1e9
"""The log importance of padding: its exp is 0, and unlike -inf it is finite."""


class MergeDecisions(NamedTuple):
    """The decisions of new tokens, each [B, G, T]."""

    merge: Tensor
    """bool: whether the token's pair is merged into the slot before it."""
    log_importance: Tensor
    """fp32: log omega, the weight of the token's pair."""


class RunningMean(NamedTuple):
    """The accumulation in each KV head's last slot, in fp32 at least."""

    k_BG1D: Tensor
    v_BG1D: Tensor
    log_weight_BG1: Tensor
    """log z, the slot's weight."""


def accumulate(
    k_BGTD: Tensor, v_BGTD: Tensor, decided: MergeDecisions, new: NewTokens, before: RunningMean | None
) -> tuple[Tensor, Tensor, RunningMean]:
    """The accumulations of the new tokens, and the running mean after them.

    Args:
        k_BGTD, v_BGTD: keys after RoPE, and values.
        before: the running mean before the new tokens; None if these are the first tokens.

    Returns:
        k' and v' in the types of k and v (meaningless at padding), and the running mean to go on from.
    """
    work = torch.promote_types(k_BGTD.dtype, torch.float32)
    first_k, first_v = k_BGTD[:, :, :1].to(work), v_BGTD[:, :, :1].to(work)
    if before is None:
        zero_BG1 = first_k.new_zeros(first_k.shape[:3])
        before = RunningMean(torch.zeros_like(first_k), torch.zeros_like(first_v), zero_BG1)
    position_B1T = new.position_BT[:, None]
    # Padding leaves the running mean as it is: it is merged with no weight.
    merge_BGT = (decided.merge & (position_B1T > 0)) | (position_B1T < 0)
    log_importance_BGT = decided.log_importance.to(work).masked_fill(position_B1T < 0, NO_IMPORTANCE)
    alpha = torch.cat([torch.zeros_like(before.log_weight_BG1), merge_BGT.to(work)], dim=2)
    log_importance = torch.cat([before.log_weight_BG1, log_importance_BGT], dim=2)
    k = torch.cat([before.k_BG1D, k_BGTD.to(work)], dim=2)
    v = torch.cat([before.v_BG1D, v_BGTD.to(work)], dim=2)
    k, v = merge_pairs(k, v, alpha, log_importance)
    run = (alpha == 0).cumsum(dim=2)
    log_weight_BG1 = log_importance.masked_fill(run != run[..., -1:], -torch.inf).logsumexp(2, keepdim=True)
    running = RunningMean(*(x.detach() for x in (k[:, :, -1:], v[:, :, -1:], log_weight_BG1)))
    return k[:, :, 1:].to(k_BGTD.dtype), v[:, :, 1:].to(v_BGTD.dtype), running


class DMCAttention(DMSAttention):
    """Attention in which each KV head merges the pairs that its keys mark."""

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
        """As DMSAttention.decide_and_attend; the queries also decide the importance of each pair."""
        raw_BGT = q_BHTD[:, self.borrowed_query_heads, :, -1].float()
        settings = self.settings
        log_importance_BGT = F.logsigmoid(settings.importance_scale * raw_BGT - settings.importance_offset)
        decided = MergeDecisions(self.decide(q_BHTD, k_BGTD, residual), log_importance_BGT)
        q_BHTD, k_BGTD = self.rotate(q_BHTD, k_BGTD, position_embeddings)
        new = step.new.to(q_BHTD.device)
        return self.merge_and_attend(q_BHTD, k_BGTD, v_BGTD, decided, new, step.meter, cache)

    def without_borrowed(self, q_BHTD: Tensor, k_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        q_BHTD, k_BGTD = super().without_borrowed(q_BHTD.clone(), k_BGTD)
        q_BHTD[:, self.borrowed_query_heads, :, -1].zero_()
        return q_BHTD, k_BGTD

    def merge_and_attend(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        decided: MergeDecisions,
        new: NewTokens,
        meter: KVMeter,
        cache: DMSCache | None,
    ) -> Tensor:
        """Accumulate the new pairs, then store and attend to the accumulations like DMS does to pairs.

        Raises:
            TypeError: the cache cannot merge.
        """
        if cache is None:
            k_BGTD, v_BGTD, _ = accumulate(k_BGTD, v_BGTD, decided, new, None)
        elif isinstance(cache, DMCCache):
            store = cache.layers[self.layer_idx]
            k_BGTD, v_BGTD, store.running = accumulate(k_BGTD, v_BGTD, decided, new, store.running)
        else:
            raise TypeError(f"the cache is a {type(cache).__name__}, expected the one of model.make_cache()")
        return self.store_and_attend(q_BHTD, k_BGTD, v_BGTD, decided.merge, new, meter, cache)


class DMCCacheLayer(DMSCacheLayer):
    """The slots of one attention layer, and the accumulation in each head's last one."""

    def _forget_everything(self) -> None:
        super()._forget_everything()
        self.running: RunningMean | None = None

    @property
    def bookkeeping_bytes(self) -> int:
        running = () if self.running is None else self.running
        return super().bookkeeping_bytes + sum(part.nbytes for part in running)

    def select_sequences(self, index: Tensor) -> None:
        super().select_sequences(index)
        if self.running is not None:
            index = index.to(self.device)
            self.running = RunningMean(*(part.index_select(0, index) for part in self.running))


class SlotMeter(KVMeter):
    """A KVMeter whose achieved CR is tokens / slots: a sequence's first token counts as not merged."""

    def start_forward(self, before_B: Tensor, count_B: Tensor, lag: int, num_heads: int) -> None:
        super().start_forward(before_B, count_B, 0, num_heads)


class DMCCache(DMSCache):
    """The cache that merges pairs."""

    layers: Sequence[DMCCacheLayer]

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
        # Checked first: a model that evicts also lacks the settings that only merging has.
        if getattr(config, "dms_method", DMSSettings.method) == "evict":
            raise ValueError(
                "dms_method in config.json is 'evict', expected 'merge': this model evicts pairs; load it "
                "with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
            )
        return DMSSettings.from_entries(vars(config))

    def make_cache(self) -> DMCCache:
        """An empty cache for this model, to pass as past_key_values (CACHE_NAME) and keep."""
        return DMCCache(len(self.model.layers), self.dms_settings, self.page_attention)

    def graphed_step(self, cache: DMSCache) -> NoReturn:
        """Refuse decode steps as a CUDA graph: the running mean of a slot does not change in place."""
        raise NotImplementedError("decode steps of a model that merges pairs cannot be a CUDA graph")


def load_dmc(folder: Path, dtype: str, device: str) -> Any:
    """Load the exported model of a run with --dms-method merge, in evaluation mode; none of its code runs.

    Args:
        dtype: "auto" (the dtype that config.json names), "float32", "bfloat16" or "float16".
        device: a device name of torch.

    Raises:
        ValueError: the folder is not an exported model that merges pairs, or its weights do not fit its
            config.
    """
    check_exported(folder)
    merging = merging_class(base_model_type(str(read_config(folder).get("model_type"))))
    merging._read_settings(merging.config_class.from_pretrained(folder, local_files_only=True))
    return load_weights(merging, folder, dtype, device)


def merging_class(model_type: str) -> Any:
    """The class of a merging model for a model type, a key of MODEL_CLASSES.

    Raises:
        ValueError: there is no class for this model type.
    """
    if model_type not in MODEL_CLASSES:
        raise ValueError(f"model_type is {model_type!r}, expected one of {sorted(MODEL_CLASSES)}")
    exported = getattr(modeling_dms, MODEL_CLASSES[model_type])
    return type(exported.__name__.replace("DMS", "DMC"), (DMCForCausalLM, exported), {})
