"""config.json as programs write it: keys without effect, nulls, other spellings, keys of other programs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dms.cli.convert import main
from megatron_dms.conversion import CheckpointError, export_hf, import_hf
from megatron_dms.conversion.families import config_keys, read_model
from megatron_dms.planning.models import of_folder
from tests.support.checkpoint_edits import DMS, files_of, rewrite
from tests.support.hf_checkpoints import MAKERS, SHAPE, edit_config, make_llama, make_qwen3

LLAMA = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (
            LLAMA,
            {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "_commit_hash": "ab", "finetuned": 1},
        ),
        (LLAMA, {"use_return_dict": True, "model_max_length": 9, "tokenizer_padding_side": "left"}),
        (LLAMA, {"neftune_noise_alpha": 5, "internal_version": "x", "_flash_attn_2_enabled": True}),
        (LLAMA, {"architectures": None}),
        (LLAMA, {"dtype": "auto"}),
        (LLAMA, {"dtype": "torch.bfloat16", "torch_dtype": "bfloat16"}),
        (LLAMA, {"mlp_bias": None, "attention_bias": None, "use_sliding_window": None}),
        (MISTRAL, {"sliding_window": 256}),
        (MISTRAL, {"sliding_window": 4096}),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 256, "layer_types": ["sliding_attention"] * 2},
        ),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 16}),
        (LLAMA, {"rope_scaling": {**YARN, "finetuned": True}}),
    ],
)
def test_what_does_not_change_the_model_is_read(base: dict, changes: dict) -> None:
    """Catches: a key that programs leave behind refused; a null, or another spelling, taken for a value."""
    found, plain = read_model({**base, **changes}), read_model({**base, "sliding_window": None})
    left = ("rope", "dtype")
    assert {**vars(found), **dict.fromkeys(left)} == {**vars(plain), **dict.fromkeys(left)}
    assert found.dtype == ("bfloat16" if "torch_dtype" in changes else None)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            MISTRAL,
            {"sliding_window": 255},
            "sliding_window is 255, .* shorter than max_position_embeddings 256",
        ),
        (MISTRAL, {"sliding_window": 255, "use_sliding_window": False}, "sliding_window is 255"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window is True"),
        (QWEN2, {"use_sliding_window": 1, "sliding_window": 512}, "use_sliding_window is 1, expected true"),
        (LLAMA, {"dtype": "torch.float8_e4m3fn"}, "dtype is"),
        (LLAMA, {"architectures": []}, "architectures"),
        (
            LLAMA,
            {"dual_chunk_attention_config": {}},
            "vLLM attends in chunks.*--accept-config-key dual_chunk",
        ),
        (LLAMA, {f"key{n}": 1 for n in range(500)}, "key0, key1, key10 and 497 more"),
    ],
)
def test_what_may_change_the_model_is_refused(base: dict, changes: dict, message: str) -> None:
    """Catches: a window that hides something, a type that cannot be converted, a line without an end."""
    with pytest.raises(CheckpointError, match=message) as error:
        read_model({**base, **changes})
    assert len(str(error.value)) < 500


def test_yarn_with_attn_factor_says_what_two_programs_make_of_it() -> None:
    """R1-0528-Qwen3-8B has it. Catches: the key ignored as transformers does, an advice that is not taken."""
    factor = {**YARN, "attn_factor": 0.8782488562869419}
    with pytest.raises(
        CheckpointError, match=r"by 1.139\), vLLM reads it .* by 1\).*\"attention_factor\": 1 "
    ):
        read_model({**LLAMA, "rope_scaling": factor})
    found = read_model({**LLAMA, "rope_scaling": {**factor, "attention_factor": 1.0}})
    assert found.rope["attention_factor"] == 1.0 and "attn_factor" not in found.rope
    assert read_model({**LLAMA, "rope_scaling": YARN}).rope["attention_factor"] == pytest.approx(1.138629)
    for odd in (None, "x", True, {}):
        with pytest.raises(CheckpointError, match="attn_factor"):
            read_model({**LLAMA, "rope_scaling": {**factor, "attn_factor": odd}})


def test_the_first_llama_has_its_length_under_another_name() -> None:
    """Catches: max_sequence_length dropped, or preferred to max_position_embeddings."""
    first = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    assert read_model({**first, "max_sequence_length": 2048}).positions == 2048
    assert read_model({**LLAMA, "max_sequence_length": 2048}).positions == 256
    with pytest.raises(CheckpointError, match="max_position_embeddings is None"):
        read_model(first)


@pytest.mark.parametrize("family", MAKERS)
def test_a_null_head_dim_is_told_by_the_tensors(family: str, tmp_path: Path) -> None:
    """Catches: the family's default taken though q_proj has other rows; a retrofit's export with a null, at
    which transformers fails."""
    source = MAKERS[family](tmp_path / "hf", **({} if family == "qwen2" else {"head_dim": 16}))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "head_dim": None}))
    import_hf(source, megatron := tmp_path / "megatron")
    export_hf(megatron, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    rewrite(megatron, {}, {"dms": {**DMS, "predictor": "query_channel"}, "dms_reached_cr": 2}, iteration=3)
    export_hf(megatron, tmp_path / "dms")
    assert json.loads((tmp_path / "dms/config.json").read_text())["head_dim"] == (
        8 if family == "qwen2" else 16
    )


def test_a_retrofit_of_an_odd_config_can_be_loaded(tmp_path: Path) -> None:
    """transformers fails at each of these. Catches: an export that carries them on; a base model's bytes
    changed."""
    source = make_llama(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    odd = {**config, "dtype": "torch.float32", "mlp_bias": None, "attention_bias": None, "head_dim": None}
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(odd).encode())  # as some editors save
    assert of_folder(source).layers == 2
    import_hf(source, megatron := tmp_path / "megatron")
    export_hf(megatron, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    rewrite(megatron, {}, {"dms": {**DMS, "predictor": "query_channel"}, "dms_reached_cr": 2}, iteration=3)
    export_hf(megatron, tmp_path / "dms")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dms", trust_remote_code=True)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_a_window_that_hides_nothing_is_no_window_after_the_retrofit(tmp_path: Path) -> None:
    """Catches: an export whose config.json still names sliding layers, which its code refuses; a window that
    is not in use rewritten."""
    window = {"use_sliding_window": True, "sliding_window": 256, "layer_types": ["sliding_attention"] * 2}
    found = read_model({**QWEN2, **window})
    full = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    assert found.corrections({**QWEN2, **window}) == full
    assert found.corrections({**QWEN2, "use_sliding_window": False, "sliding_window": 16}) == {}
    assert read_model({**MISTRAL, "sliding_window": 300}).corrections({**MISTRAL, "sliding_window": 300}) == {
        "sliding_window": None
    }


def test_an_unknown_key_is_let_through_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches: a flag that lets other keys through, a name that the checkpoint does not record (its export
    would be refused), a key that the export drops, a known key that must be off lifted by the flag."""
    source = make_qwen3(tmp_path / "hf")
    edit_config(source, of_a_program=1, of_another=2)
    words = ["import", "--hf", str(source), "--megatron", str(tmp_path / "megatron")]
    assert main(words) == 2
    assert "--accept-config-key of_a_program --accept-config-key of_another" in capsys.readouterr().err
    assert main([*words, "--accept-config-key", "of_a_program"]) == 2
    assert main([*words, "--accept-config-key", "of_a_program", "--accept-config-key", "of_another"]) == 0
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    edit_config(source, of_a_third=3)
    with pytest.raises(CheckpointError, match="unknown keys of_a_third;"):
        export_hf(tmp_path / "megatron", tmp_path / "other", hf_source=source)
    export_hf(tmp_path / "megatron", tmp_path / "other", hf_source=source, accepted_keys=["of_a_third"])
    edit_config(source, mlp_bias=True)
    with pytest.raises(CheckpointError, match="mlp_bias is True"):
        import_hf(
            source, tmp_path / "no", accepted_keys=["mlp_bias", "of_a_program", "of_another", "of_a_third"]
        )


def test_no_key_is_in_two_lists() -> None:
    """Catches: a key that must be off, or is read, listed as one without effect."""
    lists = (config_keys._READ, frozenset(config_keys._OFF), config_keys._WITHOUT_EFFECT)
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
