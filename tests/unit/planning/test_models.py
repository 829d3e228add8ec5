"""Planning: parameter counts against transformers' classes, the name tables and Megatron's own accounting."""

import json
from argparse import Namespace
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_dms.conversion.families import read_model
from megatron_dms.planning.models import PRESETS, ModelSize, of_folder, preset

TINY = ModelSize("tiny", 3, 48, 80, 6, 2, 16, 131, 64)
CLASSES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"qkv_bias": True}),
    "qwen3": (Qwen3Config, {"qk_norm": True}),
}


def hf_config(model_type: str, size: ModelSize) -> dict:
    """Return the content of a config.json."""
    config_class, _ = CLASSES[model_type]
    head = {} if model_type == "qwen2" else {"head_dim": size.head_size}
    config = config_class(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        tie_word_embeddings=size.tied,
        max_position_embeddings=size.positions,
        **head,
    )
    return config.to_dict() | {"architectures": [config_class.__name__.replace("Config", "ForCausalLM")]}


def built(model_type: str, size: ModelSize) -> int:
    """Return the number of parameters of transformers' model, built without memory for them."""
    config = CLASSES[model_type][0].from_dict(hf_config(model_type, size))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
def test_parameters_are_those_of_transformers(model_type: str, tied: bool) -> None:
    """Catches: a bias, a norm or a projection left out, groups taken for heads, a tied layer twice."""
    head_size = 8 if model_type == "qwen2" else 16  # Qwen2's is always hidden / heads
    size = replace(TINY, tied=tied, head_size=head_size, **CLASSES[model_type][1])
    assert size.parameters() == built(model_type, size)


@pytest.mark.parametrize(
    ("name", "model_type"), [("llama-3.2-1b", "llama"), ("qwen-r1-1.5b", "qwen2"), ("qwen3-8b", "qwen3")]
)
def test_presets_have_the_parameters_of_their_class(name: str, model_type: str) -> None:
    size = preset(name)
    assert size.parameters() == built(model_type, size)


def test_presets_have_the_public_sizes() -> None:
    """Compares with the checkpoints' own index files. Catches: a number of a preset mistyped."""
    assert {name: size.parameters() for name, size in PRESETS.items()} == {
        "llama-3.2-1b": 1_235_814_400,
        "llama-2-7b": 6_738_415_616,
        "llama-3.1-8b": 8_030_261_248,
        "qwen-r1-1.5b": 1_777_088_000,
        "qwen-r1-7b": 7_615_616_512,
        "qwen-r1-32b": 32_763_876_352,
        "qwen3-8b": 8_190_735_360,
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
def test_parameters_are_those_of_the_name_tables(model_type: str, tied: bool, tmp_path: Path) -> None:
    """Counts with the linear predictor, from the config.json that a conversion reads. Catches: a predictor
    without its norm or bias, a key of config.json read wrongly."""
    head_size = 8 if model_type == "qwen2" else 16
    wanted = replace(TINY, tied=tied, head_size=head_size, **CLASSES[model_type][1])
    config = hf_config(model_type, wanted)
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = of_folder(tmp_path)
    assert size == replace(wanted, name=tmp_path.name)
    model = read_model(config)
    rows = model.family.rows(model, "linear")
    total = sum(prod(row.megatron_shape) * len(row.layers(model.layers)) for row in rows)
    assert size.parameters() + size.layers * size.predictor_parameters() == total


def test_stages_add_up() -> None:
    """The parameters of all ranks are the model's, the padding, and the copies that several ranks hold.
    Catches: an embedding on every stage, a copy of a tied one forgotten, norms divided by TP."""
    size = replace(TINY, layers=4, qk_norm=True)
    table = 256 * 48  # 131 rows padded to 128 x TP 2
    for pp, tied, tables in [(1, False, 2), (2, False, 2), (4, False, 2), (1, True, 1), (2, True, 2)]:
        model = replace(size, tied=tied)
        found = sum(2 * model.stage_parameters(2, pp, stage) for stage in range(pp))
        matrices = 4 * 48 * (2 * 96 + 2 * 32 + 3 * 80)
        norms = 2 * (4 * (2 * 48 + 2 * 16) + 48)  # once on each of two ranks
        assert found == matrices + norms + tables * table, (pp, tied)
    assert size.padded_vocab(1) == 256 and size.padded_vocab(4) == 512


def test_more_tensor_parallel_never_means_more_weights() -> None:
    for model in PRESETS.values():
        for stage in (0, 1):
            counts = [model.stage_parameters(tp, 2, stage, predictor=True) for tp in (1, 2, 4, 8)]
            assert counts == sorted(counts, reverse=True), model.name


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "llama-3.2-1b"])
def test_weights_and_optimizer_are_those_of_megatron(name: str) -> None:
    """Against Megatron's report of theoretical memory, on its "most loaded" stage.

    It puts an equal part of the final norm on every stage; nothing else may differ.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    model, (tp, pp, dp) = preset(name), (4, 2, 8)
    args = Namespace(
        kv_channels=model.head_size, num_attention_heads=model.heads, hidden_size=model.hidden,
        group_query_attention=True, num_query_groups=model.groups, num_experts=None, swiglu=True,
        moe_shared_expert_intermediate_size=None, ffn_hidden_size=model.ffn, num_layers=model.layers,
        mtp_num_layers=None, normalization="RMSNorm", multi_latent_attention=False,
        padded_vocab_size=model.padded_vocab(tp), untie_embeddings_and_output_weights=not model.tied,
        expert_tensor_parallel_size=1, expert_model_parallel_size=1, pipeline_model_parallel_size=pp,
        tensor_model_parallel_size=tp, world_size=tp * pp * dp, data_parallel_size=dp,
        use_distributed_optimizer=True, moe_latent_size=None,
    )  # fmt: skip
    theirs = compute_weight_and_optimizer_memory(args)
    ours = model.stage_parameters(tp, pp, 0) * (2 + 4 + 12 / dp)
    assert theirs - ours == pytest.approx(model.hidden / pp * (2 + 4 + 12 / dp))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds list, expected an object"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is unknown"),
    ],
)
def test_bad_folders(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json") as error:
        of_folder(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"model is 'gpt', expected one of llama-3.2-1b, .*, or --hf DIR"):
        preset("gpt")
    with pytest.raises(ValueError, match=r"nowhere/config.json cannot be read"):
        of_folder(Path("nowhere"))
