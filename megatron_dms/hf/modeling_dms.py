"""Causal language models with Dynamic Memory Sparsification, for transformers >= 4.57 (and 5.x).

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)
    model.last_kv_stats.achieved_cr

Each class is transformers' own model with its attention layers replaced. Everything else (MLP, norms, RoPE,
loading) is the base model's. This file depends on behaviour of transformers beyond its documented extension
points (checked with 4.57, 5.23 and 5.24) in these places: the methods `_prepare_generated_length`,
`_prepare_cache_for_generation` and `_get_stopping_criteria` are overridden; the base model passes on a 4D
attention mask unchanged; unknown keywords of the base model's forward reach its decoder layers and their
self_attn.

(This file is copied flat into every exported checkpoint: it uses relative imports, torch and transformers
only.)
"""

from typing import TYPE_CHECKING, Any, NoReturn

if "DMSForCausalLM" in globals() and __name__.startswith("transformers_modules."):
    # transformers 4 names a folder's modules by the last part of its path alone, and runs a second folder's
    # code in the first one's module: models that were loaded before would go on with the other's functions.
    raise ImportError(
        "another export, whose folder has the same name and other code, was loaded in this process, and this "
        "release of transformers keeps one code for both: rename one of the folders, or use transformers 5"
    )

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.generation import StoppingCriteriaList
from transformers.utils import logging

from .attention_dms import DMSAttention, DMSStep, install_attention
from .cache_dms import CACHE_NAME, DMSCache, refuse_two_caches, rename_cache

# From a local folder, transformers 4.57 copies only the files that this file imports. The imports marked F401
# are here for that reason alone.
from .cache_layer_dms import DMSCacheLayer  # noqa: F401
from .configuration_dms import DMSSettings
from .fork_dms import first_of_equal_rows, repeat_rows
from .graph_dms import GraphedStep
from .model_config_dms import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, spell_rope
from .page_attention_dms import PAGE_ATTENTION  # noqa: F401
from .page_kernel_dms import attend_pages_triton  # noqa: F401
from .pages_dms import PagePool  # noqa: F401
from .refusals_dms import (
    max_positions,
    refuse_cache_in_checkpointing,
    refuse_chunks_of_padding,
    refuse_continuation,
    refuse_foreign_cache,
    refuse_frozen_positions,
    refuse_generation_modes,
    refuse_hidden_past,
    refuse_length,
    refuse_merging,
    refuse_other_autocast,
    refuse_outputs,
    refuse_packed,
    refuse_positions,
    refuse_sliding_layers,
)
from .sparse_attention_dms import NewTokens
from .stats_dms import KVMeter, KVStats

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class CausalLM(PreTrainedModel, GenerationMixin):
        """What every class below has beside the mixin: a causal LM of transformers."""

        model: Any
        """The family's base model, such as a LlamaModel."""
else:
    CausalLM = object

logger = logging.get_logger(__name__)

# The order in which every family's base model takes these inputs, for callers that pass them by position.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds")


class DMSForCausalLM(CausalLM):
    """Mixin that turns a transformers causal LM into its DMS version; goes before it in the list of bases."""

    _supports_flash_attn = False  # the masks of a query differ between KV heads, which only SDPA can express
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _attention_class = DMSAttention
    _meter_class = KVMeter

    def __init__(self, config) -> None:
        spell_rope(config)
        super().__init__(config)
        self.dms_settings = self._read_settings(config)
        refuse_sliding_layers(config)
        self.max_positions = max_positions(config)
        self.page_attention = "torch"
        """The name in PAGE_ATTENTION (page_attention_dms.py) of the implementation that new caches use."""
        self._dms_meter: KVMeter | None = None
        install_attention(self.model.layers, self.dms_settings, self._attention_class)
        self._freeze_predictor()
        self.register_forward_pre_hook(_refuse_two_caches, with_kwargs=True)
        self.model.register_forward_pre_hook(self._prepare_step, with_kwargs=True)
        self.model.register_forward_hook(repeat_rows, with_kwargs=True)
        if self.dms_settings.disable_eviction:
            logger.warning("dms_disable_eviction is set: the model keeps every pair and its CR is 1")

    @staticmethod
    def _read_settings(config) -> DMSSettings:
        settings = DMSSettings.from_entries(vars(config))
        refuse_merging(settings)
        return settings

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but a missing or extra predictor tensor is an error: eviction depends on it."""
        if kwargs.get("tp_plan") is not None:
            raise ValueError(
                f"tp_plan={kwargs['tp_plan']!r} is not supported by DMS models; use device_map instead"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            tensors = sorted(key for key in info[problem] if ".dms_proj_alpha" in key)
            if tensors:
                raise ValueError(
                    f"{problem.replace('_keys', '')} predictor tensors {tensors} for dms_predictor "
                    f"{model.dms_settings.predictor!r}: the weights and config.json are not of one export"
                )
        model._freeze_predictor()  # loading makes every parameter trainable
        return (model, info) if wants_info else model

    def _freeze_predictor(self) -> None:
        """Freeze the linear predictor: decisions are hard here, and DDP would wait for its gradient."""
        for name, parameter in self.named_parameters():
            if ".dms_proj_alpha" in name:
                parameter.requires_grad_(False)

    @property
    def last_kv_stats(self) -> KVStats | None:
        """The cost of the cache used last, over its whole life, or of the last forward if it had no cache."""
        return None if self._dms_meter is None else self._dms_meter.stats()

    def make_cache(self) -> DMSCache:
        """An empty cache for this model, to pass as past_key_values (CACHE_NAME) and keep."""
        settings = self.dms_settings
        return DMSCache(len(self.model.layers), settings.window, settings.lag, self.page_attention)

    def graphed_step(self, cache: DMSCache) -> GraphedStep:
        """A function that runs decode steps on `cache` as a CUDA graph; see graph_dms.py."""
        return GraphedStep(self, cache)

    # ---- one forward ----

    def _prepare_step(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the base model: settle the cache, and give each token its position.

        As a hook it serves `model(...)`, `model.model(...)` and `generate`, and no forward is rewritten.
        """
        inputs = kwargs | dict(zip(MODEL_INPUTS, args, strict=False))
        tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if tokens is None or len(args) > len(MODEL_INPUTS):
            raise ValueError(f"expected input_ids or inputs_embeds, and only {MODEL_INPUTS} by position")
        rename_cache(inputs)
        refuse_outputs(self.config, inputs)
        B, T = tokens.shape[:2]
        if T == 0:
            raise ValueError("the input has no tokens")
        cache = self._settle_cache(inputs)
        copies, past = 1, 0
        if cache is not None:
            if cache.copies > 1:
                copies = first_of_equal_rows(inputs, cache, B, T)
                B //= copies
            cache.refuse_other_batch(B)
            refuse_other_autocast(cache, tokens.device.type)
            past = cache.get_seq_length()
        mask = inputs.get("attention_mask")
        real_BT = _real_tokens(mask, B, T, past, tokens.device)
        refuse_packed(inputs.get("position_ids"), real_BT, T)
        if past + T > self.max_positions:  # only now does it matter how many of the columns are padding
            refuse_positions(self.max_positions, cache, T, real_BT)
        if cache is None:
            meter = self._meter_class(len(self.model.layers))
            new = NewTokens.place(torch.zeros(B, dtype=torch.int64, device=tokens.device), T, real_BT)
        else:
            meter = cache.meter
            if past and mask is not None:
                refuse_hidden_past(mask, past, cache.seen_B)
            new = cache.place(B, T, real_BT, tokens.device)
        meter.start_forward(new.before_B, new.count_B, self.dms_settings.lag, self.config.num_key_value_heads)
        self._dms_meter = meter
        inputs[CACHE_NAME] = cache
        inputs["dms_step"] = DMSStep(new, meter, copies)
        # Nobody reads this mask. It is 4D because transformers passes a 4D mask on unchanged, and would
        # otherwise build a mask of [B, 1, T, S].
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        return (), inputs

    def _settle_cache(self, inputs: dict[str, Any]) -> DMSCache | None:
        """The DMS cache of this forward: the caller's, a new one, or None if no cache is wanted."""
        cache = inputs.get(CACHE_NAME)
        if isinstance(cache, DMSCache):
            cache.refuse_if_broken()
            refuse_foreign_cache(self, cache)
            if self._recomputes:
                refuse_cache_in_checkpointing()
            return cache
        if cache is None:
            use_cache = inputs.get("use_cache")
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return self.make_cache() if use_cache and not self._recomputes else None
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            return self.make_cache()
        raise TypeError(
            f"{CACHE_NAME} is a {type(cache).__name__}, expected None, model.make_cache() or an empty "
            "DynamicCache: a DMS model stores eviction decisions beside keys and values"
        )

    @property
    def _recomputes(self) -> bool:
        """Whether layers run with gradient checkpointing, for which transformers takes their cache away."""
        return self.training and self.model.gradient_checkpointing

    # ---- generate ----

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        """Called once by `generate`, at a point where it knows the prompt.

        The generation_config is a copy made for the call; it carries what the next two methods need.
        """
        is_text = kwargs["model_input_name"] == "input_ids"
        generation_config._dms_prompt_columns = kwargs["input_ids_length"] if is_text else None
        # transformers types `self` here as a protocol of its own, which no nn.Module matches.
        return super()._prepare_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(  # type: ignore[override]  # typed `-> bool` there, but returns nothing
        self,
        generation_config,
        model_kwargs: dict[str, Any],
        generation_mode: str,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called once by `generate`, where transformers would make a DynamicCache."""
        mask = model_kwargs.get("attention_mask")
        refuse_generation_modes(generation_config, generation_mode)
        refuse_length(self.max_positions, max_cache_length, mask)
        refuse_chunks_of_padding(generation_config, mask)
        if model_kwargs.get("position_ids") is not None and not _counts_positions(self):
            refuse_frozen_positions(model_kwargs.pop("position_ids"), mask)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None and generation_config.use_cache:
            cache = model_kwargs[CACHE_NAME] = self.make_cache()
        generation_config._dms_meter = cache.meter if isinstance(cache, DMSCache) else None
        if isinstance(cache, DMSCache):
            cache.refuse_if_broken()
            refuse_continuation(cache, generation_config)
            cache.meter.restart_sequences()
            several = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if cache.get_seq_length() == 0:
                # Each prompt comes this many times and is computed once: see fork_dms.py.
                cache.copies = several
            cache.follows_beams = (generation_config.num_beams or 1) > 1

    def _get_stopping_criteria(self, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        """Called once by `generate`, which asks the result after every token: that is the time to count."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]
        follows_beams = (generation_config.num_beams or 1) > 1
        return CountingCriteria(criteria, self, generation_config._dms_meter, follows_beams)

    def generate_batch(self, *args, **kwargs) -> NoReturn:
        """Refuse transformers' continuous batching."""
        raise NotImplementedError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) and "
            "cache_implementation='paged' are not supported by DMS models: they bring a paged cache of their "
            "own; use generate with a padded batch"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


class CountingCriteria(StoppingCriteriaList):
    """The stopping criteria of one `generate`, which also tell the meter about each token and each end."""

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        model: DMSForCausalLM,
        meter: KVMeter | None,
        follows_beams: bool,
    ) -> None:
        """`meter` is the meter of the cache, or None if `generate` starts without a DMS cache."""
        super().__init__(criteria)
        self.model = model
        self.meter = meter
        self.follows_beams = follows_beams

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        ended_B = super().__call__(input_ids, scores, **kwargs)
        if self.meter is not None:  # with guidance_scale, the latest forward was that of another branch
            self.model._dms_meter = self.meter
        meter = self.meter or self.model._dms_meter
        if meter is not None and meter.has_storage:
            if not self.follows_beams:  # a beam search has a row of ended_B for each candidate
                meter.match_rows(len(ended_B))
            # Another beam replaces a beam that ends, so the beam's slot goes on.
            meter.count_generated(None if self.follows_beams else ended_B)
        return ended_B


class LlamaForCausalLMDMS(DMSForCausalLM, LlamaForCausalLM):
    """Llama with DMS, and models with Llama's config and weights (SmolLM2, TinyLlama and the like)."""

    config_class = LlamaConfig


class MistralForCausalLMDMS(DMSForCausalLM, MistralForCausalLM):
    """Mistral with DMS."""

    config_class = MistralConfig


class Qwen2ForCausalLMDMS(DMSForCausalLM, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with DMS, the R1-distilled models among them."""

    config_class = Qwen2Config


class Qwen3ForCausalLMDMS(DMSForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with DMS."""

    config_class = Qwen3Config


def _refuse_two_caches(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the causal LM: transformers would drop a cache before the base model is called."""
    refuse_two_caches(kwargs)


def _counts_positions(model: Any) -> bool:
    """Whether transformers' `generate` counts position_ids on from step to step, as releases from 5.0 do."""
    return hasattr(model, "_prepare_position_ids_for_generation")


class OnlyCausalLM:
    """What Auto classes other than AutoModelForCausalLM get from an export: a refusal in one line.

    Without this class they would build transformers' own model, which evicts nothing.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> NoReturn:
        """Refuse to load the folder.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a DMS checkpoint holds a causal language model, and no other kind of model is built from it: "
            "load it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
        )

    from_config = register_for_auto_class = from_pretrained


# transformers 4 asks a class of remote code for this method, where transformers 5 registers the class first.
OnlyCausalLM._from_config = OnlyCausalLM.from_pretrained  # type: ignore[attr-defined]


def _real_tokens(mask: Tensor | None, B: int, T: int, past: int, device: torch.device) -> Tensor | None:
    """[B, T] bool, False for padding among the new tokens; None if none of them is padding.

    Args:
        mask: the attention_mask that the caller passed: [B, past + T], 1 for real tokens, or None.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (B, past + T):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {found}, a DMS model expects [batch, seen + new tokens] = {(B, past + T)}, "
            "0 for padding; what a query may see beyond that is the eviction's business"
        )
    real_BT = mask[:, past:].to(device=device, dtype=torch.bool)
    return None if bool(real_BT.all()) else real_BT
