"""Layer specs: a plain GPT (the teacher) and the same GPT with DMS attention (the student).

Both start from Megatron's own spec, local or Transformer Engine. In the student, the self-attention and the
core attention are replaced, and nothing else. Without Transformer Engine, the norms of both are replaced
(norms.py), and the core attention of the plain GPT (plain_attention.py).
"""

from copy import deepcopy
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.attention import DMSCoreAttention, DMSSelfAttention
from megatron_dms.mcore.norms import NormColumnParallelLinear, RMSNorm
from megatron_dms.mcore.plain_attention import PlainCoreAttention


def dense_block_spec(
    config: Any, vp_stage: int | None = None, *, score_matrix: bool = False
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, without DMS.

    Args:
        config: a TransformerConfig or GPTModelConfig.
        score_matrix: whether attention computes T x T scores (plain_attention.py). Transformer Engine's
            attention ignores it.
    """
    layer = _dense_layer_spec(config)
    if config.transformer_impl != "transformer_engine":
        plain = partial(PlainCoreAttention, score_matrix=score_matrix)
        layer.submodules.self_attention.submodules.core_attention = plain
    return _block(layer, config, vp_stage)


def dms_block_spec(config: Any, vp_stage: int | None = None, *, dms: DMSConfig) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, with DMS attention, as Megatron's model builder asks for
    them."""
    layer = deepcopy(_dense_layer_spec(config))
    attention = layer.submodules.self_attention
    attention.module = DMSSelfAttention
    attention.params = {**attention.params, "dms": dms}
    attention.submodules.core_attention = partial(DMSCoreAttention, dms=dms)
    return _block(layer, config, vp_stage)


def _dense_layer_spec(config: Any) -> ModuleSpec:
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    submodules = layer.submodules
    submodules.input_layernorm = IdentityOp
    submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.linear_qkv = NormColumnParallelLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _block(layer: ModuleSpec, config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    final_norm = _te_norm() if config.transformer_impl == "transformer_engine" else RMSNorm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm  # only if installed

    return TENorm
