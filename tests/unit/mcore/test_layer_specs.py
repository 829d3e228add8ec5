"""Student and teacher layers: what is replaced in Megatron's own specs; nothing else is."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_dms.config import DMSConfig
from megatron_dms.mcore import layer_specs
from megatron_dms.mcore.attention import DMSCoreAttention, DMSSelfAttention

LAYERS = 3


class FusedNormLinear:
    """Stands for Transformer Engine's norm + linear."""


def te_like_spec(qk_layernorm: bool) -> ModuleSpec:
    """Return a spec of Transformer Engine's shape, where Transformer Engine itself is not installed."""
    spec = layer_specs.get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.linear_qkv = FusedNormLinear
    return spec


@pytest.fixture
def te_config(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(layer_specs, "get_gpt_layer_with_transformer_engine_spec", te_like_spec)
    monkeypatch.setattr(layer_specs, "get_num_layers_to_build", lambda config, vp_stage: LAYERS)
    monkeypatch.setattr(layer_specs, "_te_norm", lambda: FusedNormLinear)
    return SimpleNamespace(transformer_impl="transformer_engine", qk_layernorm=True)


def test_transformer_engine_spec_keeps_all_but_attention(te_config: SimpleNamespace) -> None:
    """Catches a local module put where Transformer Engine's belongs, and a student that differs from its
    teacher in more than attention. (Transformer Engine itself is not run here.)"""
    student = layer_specs.dms_block_spec(te_config, dms=DMSConfig(window=5))
    teacher = layer_specs.dense_block_spec(te_config)
    assert len(student.layer_specs) == len(teacher.layer_specs) == LAYERS
    own, plain = student.layer_specs[0].submodules, teacher.layer_specs[0].submodules
    for item in fields(plain):
        if item.name not in ("self_attention", "mlp"):
            assert getattr(own, item.name) == getattr(plain, item.name), item.name
    attention = own.self_attention
    assert attention.module is DMSSelfAttention and attention.params["dms"].window == 5
    assert attention.submodules.core_attention.func is DMSCoreAttention
    assert attention.submodules.linear_qkv is FusedNormLinear
    assert plain.self_attention.module is not DMSSelfAttention


def test_students_spec_leaves_the_teachers_alone(te_config: SimpleNamespace) -> None:
    """Catches a shallow copy: a teacher built after the student would get DMS attention."""
    layer_specs.dms_block_spec(te_config, dms=DMSConfig())
    teacher = layer_specs.dense_block_spec(te_config).layer_specs[0].submodules.self_attention
    assert "dms" not in teacher.params and teacher.submodules.core_attention is not DMSCoreAttention
