"""Checkpoints that Megatron-LM itself wrote: its arguments are compared with config.json, or refused by
name."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from megatron_dms.conversion import CheckpointError, export_hf, import_hf
from megatron_dms.conversion import megatron_arguments as arguments
from tests.support.checkpoint_edits import rewrite, tensors_of
from tests.support.hf_checkpoints import LINEAR, make_llama

FOREIGN = {"rope_parameters": None, "vocab_size": 77}  # the tokenizer's, which may have fewer than the rows
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": 8192}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.slow
def test_each_argument_of_megatron_is_handled_or_known_to_be_harmless() -> None:
    """Catches: an argument of a newer Megatron that changes the computation and that nobody looked at."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    names = {action.dest for action in parser._actions} - {"help"}
    assert len(names) > 700
    unknown = sorted(names - arguments.HANDLED - arguments.HARMLESS)
    assert not unknown, "compare these with config.json, or list them in megatron_argument_names.py"
    assert not arguments.HANDLED & arguments.HARMLESS
    for name, off in arguments.OFF.items():  # what is off by default must be let through
        default = parser.get_default(name)
        assert default is None or default in off, name


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return imports of models that differ in RoPE: its type -> the folder of the Megatron checkpoint."""
    root = tmp_path_factory.mktemp("foreign")
    for name, rope in {"default": DEFAULT, "linear": LINEAR, "llama3": LLAMA31}.items():
        make_llama(root / name, rope_parameters=rope)
        import_hf(root / name, root / f"{name}-megatron")
    return {name: root / f"{name}-megatron" for name in ("default", "linear", "llama3")}


@pytest.mark.parametrize(
    ("rope", "args"),
    [
        ("default", {}),
        ("default", {"window_size": (-1, 0)}),
        ("default", {"window_size": [255, 0]}),  # 256 positions
        ("default", {"qk_clip": True, "attention_dropout": 0.1, "moe_router_topk": 2, "lr": 1e-3}),
        ("default", {"of_a_fork": None, "of_a_fork_too": False, "of_a_fork_also": []}),
        ("linear", {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": 4}),
        ("llama3", {"use_rope_scaling": True, "rope_scaling_factor": 8.0}),
    ],
)
def test_the_same_model_is_exported(rope: str, args: dict, imported: dict[str, Path], tmp_path: Path) -> None:
    """Catches: an argument without effect refused, the tokenizer's vocabulary taken for the rows of the
    embedding, Megatron's own scaling of RoPE not recognised in config.json's words."""
    shutil.copytree(imported[rope], tmp_path / "megatron")
    rewrite(tmp_path / "megatron", {}, {**FOREIGN, **args}, iteration=5)
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(imported[rope].parent / rope).keys()


@pytest.mark.parametrize(
    ("rope", "args", "message"),
    [
        ("llama3", {"use_rope_scaling": False}, "use_rope_scaling False.* but .*config.json says .*llama3"),
        ("llama3", {"use_rope_scaling": True, "rotary_base": 5e5}, "rotary_base 500000.0"),
        ("default", {"use_rope_scaling": True}, "means factor 8, .* whatever --rope-scaling-factor says"),
        ("default", {"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor 4"),
        ("linear", {"use_rope_scaling": False}, "rotary_seq_len_interpolation_factor None"),
        ("default", {"rotary_base": 500000}, "rotary_base 500000"),
        ("default", {"rotary_base": "x"}, "rotary_base 'x', expected a number above 0"),
        ("default", {"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ("default", {"position_embedding_type": "yarn"}, "position_embedding_type 'yarn'"),
        ("default", {"no_rope_freq": [0, 1]}, "no_rope_freq"),
        ("default", {"rotary_interleaved": True}, "rotary_interleaved True"),
        ("default", {"apply_layernorm_1p": True}, "apply_layernorm_1p True"),
        ("default", {"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma True"),
        ("default", {"layernorm_epsilon": 1e-3}, "layernorm_epsilon 0.001"),
        ("default", {"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ("default", {"window_size": (127, 0)}, r"window_size \(127, 0\)"),
        ("default", {"qk_l2_norm": True}, "qk_l2_norm True"),
        ("default", {"softmax_type": "off-by-one"}, "softmax_type 'off-by-one'"),
        ("default", {"activation_func_clamp_value": 7.0}, "activation_func_clamp_value 7.0"),
        ("default", {"glu_linear_offset": 1.0}, "glu_linear_offset 1.0"),
        ("default", {"use_mup": True}, "use_mup True"),
        ("default", {"swiglu": False}, "swiglu False"),
        ("default", {"squared_relu": True}, "squared_relu True"),
        ("default", {"of_a_fork": 2.0}, "does not know: of_a_fork; .*--accept-argument of_a_fork"),
    ],
)
def test_another_model_of_the_same_tensors_is_refused(
    rope: str, args: dict, message: str, imported: dict[str, Path], tmp_path: Path
) -> None:
    """Catches: an argument under which the tensors are another function, exported without a word."""
    shutil.copytree(imported[rope], tmp_path / "megatron")
    rewrite(tmp_path / "megatron", {}, {**FOREIGN, **args}, iteration=5)
    with pytest.raises(CheckpointError, match=message) as error:
        export_hf(tmp_path / "megatron", tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_arguments_that_are_not_stored_have_megatrons_defaults(
    imported: dict[str, Path], tmp_path: Path
) -> None:
    """Catches: a checkpoint of an older version, without rotary_base, taken for one of any base."""
    shutil.copytree(imported["default"], tmp_path / "megatron")
    config = tmp_path / "megatron/hf/config.json"
    said = json.loads(config.read_text())
    rewrite(tmp_path / "megatron", {}, {**FOREIGN, "rotary_base": None}, iteration=5)
    export_hf(tmp_path / "megatron", tmp_path / "out")
    config.write_text(json.dumps({**said, "rope_parameters": {**DEFAULT, "rope_theta": 1e6}}))
    with pytest.raises(CheckpointError, match=r"rotary_base 10000, .*'rope_theta': 1000000.0"):
        export_hf(tmp_path / "megatron", tmp_path / "other")


def test_an_unknown_argument_can_be_let_through_by_name(imported: dict[str, Path], tmp_path: Path) -> None:
    """Catches: a flag that lets more through than the argument that it names."""
    shutil.copytree(imported["default"], tmp_path / "megatron")
    rewrite(tmp_path / "megatron", {}, {**FOREIGN, "a_fork": 1, "b_fork": 2}, iteration=5)
    with pytest.raises(CheckpointError, match="does not know: b_fork;"):
        export_hf(tmp_path / "megatron", tmp_path / "out", accepted_arguments=["a_fork"])
    export_hf(tmp_path / "megatron", tmp_path / "out", accepted_arguments=["a_fork", "b_fork"])
    rewrite(tmp_path / "megatron", {}, {**FOREIGN, "qk_l2_norm": True}, iteration=6)
    with pytest.raises(CheckpointError, match="qk_l2_norm"):
        export_hf(tmp_path / "megatron", tmp_path / "more", accepted_arguments=["qk_l2_norm"])


def test_a_run_of_ours_with_interpolation_is_refused(imported: dict[str, Path], tmp_path: Path) -> None:
    """Megatron applies the factor on top of the frequencies that set_rope gives. Catches: the stored
    frequencies taken for all that RoPE is."""
    shutil.copytree(imported["default"], tmp_path / "megatron")
    rewrite(tmp_path / "megatron", {}, {"rotary_seq_len_interpolation_factor": 2}, iteration=5)
    with pytest.raises(CheckpointError, match="rotary_seq_len_interpolation_factor 2"):
        export_hf(tmp_path / "megatron", tmp_path / "out")


def test_keys_of_single_layers_are_named_in_a_short_line(imported: dict[str, Path], tmp_path: Path) -> None:
    """Catches: every key listed, tens of thousands of characters for a real model."""
    import torch

    shutil.copytree(imported["default"], tmp_path / "megatron")
    extra = {f"decoder.layers.{n}.mlp.linear_fc2.weight": torch.zeros(2, 2) for n in range(300)}
    rewrite(tmp_path / "megatron", extra, FOREIGN, iteration=5)
    with pytest.raises(CheckpointError, match=r"and 297 more .*keys of their own") as error:
        export_hf(tmp_path / "megatron", tmp_path / "out")
    assert len(str(error.value)) < 800
