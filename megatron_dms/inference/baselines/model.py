"""Plain models on the DMS cache: the DMS classes without a predictor, without borrowed channels, and with a
policy in place of decisions.

They inherit everything that makes figures comparable: padding, a prompt computed once for all its chains,
pages, and the rules for which tokens count.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from megatron_dms.hf.attention_dms import DMSAttention
from megatron_dms.hf.cache_dms import CACHE_NAME, DMSCache
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.hf.graph_dms import GraphedStep
from megatron_dms.hf.modeling_dms import DMSForCausalLM
from megatron_dms.hf.sparse_attention_dms import NewTokens
from megatron_dms.hf.stats_dms import KVMeter

from .cache import BaselineCache
from .policies import Policy, Vanilla


class PlainAttention(DMSAttention):
    """The family's attention; the cache decides what its queries read."""

    def decide(self, q_BHTD: Tensor, k_BGTD: Tensor, residual: Tensor | None) -> Tensor:
        """[B, G, T] bool: no token decides to evict."""
        return torch.zeros(k_BGTD.shape[:3], dtype=torch.bool, device=k_BGTD.device)

    def without_borrowed(self, q_BHTD: Tensor, k_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        return q_BHTD, k_BGTD

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
        if isinstance(cache, BaselineCache):
            store = cache.layers[self.layer_idx]
            out_BHTD = store.take(q_BHTD, k_BGTD, v_BGTD, new, self.scaling)
            cache.meter.record_layer(self.layer_idx, store)
            return out_BHTD
        return super().store_and_attend(q_BHTD, k_BGTD, v_BGTD, evict_BGT, new, meter, cache)


class PlainForCausalLM(DMSForCausalLM):
    """Mixin like DMSForCausalLM. `policy` may be set at any time; a cache keeps its own policy."""

    _attention_class = PlainAttention
    policy: Policy = Vanilla()

    @staticmethod
    def _read_settings(config) -> DMSSettings:
        """Settings of a model that never evicts: no lag, so that every token counts as decided."""
        if getattr(config, "sliding_window", None) is not None and config.model_type == "mistral":
            raise ValueError(f"sliding_window of the config is {config.sliding_window}, expected None")
        return DMSSettings(predictor="query_channel", granularity="head", window=0, lag=0)

    def make_cache(self, max_new_tokens: int | None = None) -> DMSCache:
        """An empty cache with the model's policy.

        Args:
            max_new_tokens: how many tokens may follow the prompt; only vanilla needs no such number.

        Raises:
            ValueError: max_new_tokens is missing, or page_attention is not "torch", the only implementation
                that returns weights.
        """
        if isinstance(self.policy, Vanilla):
            return super().make_cache()
        if max_new_tokens is None:
            raise ValueError(
                f"the budget of {self.policy.name} depends on how long the text may get: call generate, or "
                f"pass make_cache(max_new_tokens) as {CACHE_NAME}"
            )
        if self.page_attention != "torch":
            raise ValueError(f"page_attention is {self.page_attention!r}, {self.policy.name} needs 'torch'")
        return BaselineCache(len(self.model.layers), self.policy, max_new_tokens)

    def graphed_step(self, cache: DMSCache) -> GraphedStep:
        if isinstance(cache, BaselineCache):
            raise NotImplementedError(f"CUDA graphs are not supported with {cache.policy.name}")
        return super().graphed_step(cache)

    def _settle_cache(self, inputs: dict[str, Any]) -> DMSCache | None:
        settled = super()._settle_cache(inputs)
        found = getattr(settled, "policy", Vanilla())
        if settled is None and not isinstance(self.policy, Vanilla):
            raise ValueError(f"{self.policy.name} without a cache (use_cache=False) would read everything")
        if found != self.policy:
            raise ValueError(f"this cache is one of {found}, the model's policy is {self.policy}")
        return settled

    def _prepare_cache_for_generation(  # type: ignore[override]  # see DMSForCausalLM
        self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs
    ) -> None:
        if not isinstance(self.policy, Vanilla):
            self._refuse_for_policy(generation_config, model_kwargs)
            new = generation_config.max_length - generation_config._dms_prompt_columns
            model_kwargs[CACHE_NAME] = self.make_cache(new)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _refuse_for_policy(self, generation_config, model_kwargs: dict[str, Any]) -> None:
        """Refuse options that a policy cannot follow, or that need several prompts on one budget."""
        name = self.policy.name
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(f"num_beams={generation_config.num_beams} is not supported with {name}")
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            raise ValueError(
                f"prefill_chunk_size is not supported with {name}: it cuts the prompt as a whole"
            )
        if not generation_config.use_cache:
            raise ValueError(f"use_cache=False is not supported with {name}: it would read everything")
        if model_kwargs.get(CACHE_NAME) is not None:
            raise ValueError(
                f"{CACHE_NAME} is not supported with {name}: its budget is one call's; leave it out"
            )
        if generation_config._dms_prompt_columns is None:
            raise ValueError(f"inputs_embeds is not supported with {name}; pass input_ids")


class PlainLlama(PlainForCausalLM, LlamaForCausalLM):
    """The plain Llama model."""


class PlainMistral(PlainForCausalLM, MistralForCausalLM):
    """The plain Mistral model, without a sliding window."""


class PlainQwen2(PlainForCausalLM, Qwen2ForCausalLM):
    """The plain Qwen2 model."""


class PlainQwen3(PlainForCausalLM, Qwen3ForCausalLM):
    """The plain Qwen3 model."""


PLAIN_CLASSES: dict[str, type[PlainForCausalLM]] = {
    "llama": PlainLlama,
    "mistral": PlainMistral,
    "qwen2": PlainQwen2,
    "qwen3": PlainQwen3,
}
