"""Damaged, incomplete and contradictory checkpoints are named in one error, and nothing is left behind."""

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms.conversion import (
    CheckpointError,
    check_model_args,
    checkpoint_args,
    export_files,
    export_hf,
    import_hf,
    set_model_args,
    set_parser_defaults,
)
from megatron_dms.files import staged_folder
from tests.support.hf_checkpoints import edit_config

FIRST = "model-00001-of-00003.safetensors"


def change_tensors(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path, missing: int) -> None:
    file.write_bytes(file.read_bytes()[:-missing])


def without_last(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()


HF_DAMAGE = {
    "config.json is missing": lambda d: (d / "hf/config.json").unlink(),
    "config.json cannot be read": lambda d: (d / "hf/config.json").write_text("{"),
    "fetch it again": lambda d: cut(d / "hf" / FIRST, 1),
    f"{FIRST} is truncated": lambda d: (d / "hf" / FIRST).write_bytes(b"\xff" * 4),
    f"{FIRST} is missing": lambda d: (d / "hf" / FIRST).unlink(),
    "neither model.safetensors nor": lambda d: (d / "hf/model.safetensors.index.json").unlink(),
    "has both": lambda d: (d / "hf/model.safetensors").write_bytes(b""),
    "unknown keys": lambda d: edit_config(d / "hf", some_new_setting=1),
    "tie_word_embeddings is false": lambda d: edit_config(d / "tied", tie_word_embeddings=False),
    "tie_word_embeddings is true": lambda d: edit_config(d / "hf", tie_word_embeddings=True),
    "not expected model.layers.1": lambda d: edit_config(d / "hf", num_hidden_layers=1),
    "missing model.layers.2": lambda d: edit_config(d / "hf", num_hidden_layers=3),
    r"expected \(130, 32\)": lambda d: edit_config(d / "hf", vocab_size=130),
    "not expected extra.weight": lambda d: change_tensors(
        d / "tied/model.safetensors", lambda t: t.update({"extra.weight": torch.ones(1)})
    ),
    r"shape \(31,\)": lambda d: change_tensors(d / "tied/model.safetensors", without_last),
    "share one type": lambda d: change_tensors(
        d / "tied/model.safetensors",
        lambda t: t.update({name: t[name].half() for name in t if "1.mlp.down_proj" in name}),
    ),
    "has type I64": lambda d: change_tensors(
        d / "tied/model.safetensors", lambda t: t.update({"x": torch.ones(1, dtype=torch.int64)})
    ),
}


@pytest.mark.parametrize("message", HF_DAMAGE)
def test_import_refuses_and_leaves_nothing(message: str, copies: Path, tmp_path: Path) -> None:
    """Catches: any of these accepted, reported as something else, or failing after the output was begun."""
    HF_DAMAGE[message](copies)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):  # one of the two is damaged, the other is not
        for name in ("hf", "tied"):
            import_hf(copies / name, tmp_path / f"out_{name}")
            shutil.rmtree(tmp_path / f"out_{name}")
    assert sorted(tmp_path.iterdir()) == before


MEGATRON_DAMAGE = {
    "latest_checkpointed_iteration.txt is missing": lambda d: (
        d / "latest_checkpointed_iteration.txt"
    ).unlink(),
    "says 'rele'": lambda d: (d / "latest_checkpointed_iteration.txt").write_text("rele"),
    "iter_0000009 is missing": lambda d: (d / "latest_checkpointed_iteration.txt").write_text("9"),
    r"\.metadata is missing": lambda d: (d / "release/.metadata").unlink(),
    "metadata.json is missing": lambda d: (d / "release/metadata.json").unlink(),
    "metadata is damaged": lambda d: cut(d / "release/.metadata", 50),
    "expected 'torch_dist'": lambda d: (d / "release/metadata.json").write_text(
        '{"sharded_backend": "zarr"}'
    ),
    "__0_0.distcp is missing": lambda d: (d / "release/__0_0.distcp").unlink(),
    "truncated": lambda d: cut(d / "release/__0_0.distcp", 1),
}


@pytest.mark.parametrize("message", MEGATRON_DAMAGE)
def test_a_damaged_megatron_checkpoint_is_named_before_use(
    message: str, copies: Path, tmp_path: Path
) -> None:
    """Catches: a half-written or truncated checkpoint found out only by a training run on the cluster."""
    MEGATRON_DAMAGE[message](copies / "megatron")
    with pytest.raises(CheckpointError, match=message):
        checkpoint_args(copies / "megatron")
    with pytest.raises(CheckpointError, match=message):
        export_hf(copies / "megatron", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_layers 2"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon"),
        ({"tie_word_embeddings": True}, "untie_embeddings_and_output_weights"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "pretraining_tp": None},
            "qk_layernorm",
        ),
    ],
)
def test_export_refuses_another_models_config(
    change: dict, message: str, copies: Path, tmp_path: Path
) -> None:
    """Catches: --hf-source of another model, whose tensors may well have the same shapes."""
    edit_config(copies / "megatron/hf", **change)
    with pytest.raises(CheckpointError, match=message):
        export_hf(copies / "megatron", tmp_path / "out")


def test_a_failure_half_way_leaves_the_old_output_as_it_was(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: writing in place, removing the old output first, a partial folder or a tracker left behind."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(CheckpointError, match="--force"):
        import_hf(copies / "hf", out)

    def fail(done: int, total: int, size: int, all_bytes: int) -> None:
        if done == total // 2:
            assert [path.name.split("-")[0] for path in tmp_path.glob("out.*")] == ["out.partial"]
            raise KeyboardInterrupt

    for convert_it in (
        lambda: import_hf(copies / "hf", out, force=True, progress=fail),
        lambda: export_hf(copies / "megatron", out, force=True, progress=fail),
    ):
        with pytest.raises(KeyboardInterrupt):
            convert_it()
        assert [path.name for path in tmp_path.glob("out*")] == ["out"]
        assert [path.name for path in out.iterdir()] == ["old"]
    import_hf(copies / "hf", out, force=True)
    assert {path.name for path in out.iterdir()} == {"release", "hf", "latest_checkpointed_iteration.txt"}
    assert not list(tmp_path.glob("out.*"))


def test_the_tracker_is_written_last(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a tracker that names a checkpoint whose side files are not there yet."""
    seen = []
    copy_file = export_files.copy_file

    def watch(source: Path, target: Path) -> None:
        seen.append(list(tmp_path.glob("*/latest*")))
        copy_file(source, target)

    monkeypatch.setattr(export_files, "copy_file", watch)
    import_hf(copies / "hf", tmp_path / "out")
    assert seen and not any(seen)


def test_staging_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    """Catches: a file replaced by a folder under --force."""
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="is no folder"), staged_folder(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out").read_text() == "precious"


def test_a_run_gets_the_checkpoints_model_and_contradictions_are_errors(copies: Path) -> None:
    """Catches: Megatron's default epsilon, or a vocabulary of the tokenizer's size, kept in silence."""
    (copies / "megatron/hf/tokenizer_config.json").write_text("{}")
    checkpoint = checkpoint_args(copies / "megatron")
    parser = ArgumentParser()
    parser.add_argument("--norm-epsilon", dest="layernorm_epsilon", type=float, default=1e-5)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=8)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2)
    set_parser_defaults(parser, checkpoint, copies / "megatron/hf")
    args = parser.parse_args([])
    args.padded_vocab_size = 128  # as Megatron would count it from a tokenizer of 120 tokens
    set_model_args(args, checkpoint)
    check_model_args(args, checkpoint)
    assert (args.layernorm_epsilon, args.vocab_size, args.padded_vocab_size) == (1e-6, 131, 144)
    assert args.rope_parameters["factor"] == 4.0 and args.qk_layernorm is False
    assert json.loads((Path(args.tokenizer_model) / "config.json").read_text())["model_type"] == "llama"
    args = parser.parse_args(["--norm-epsilon", "1e-5"])
    with pytest.raises(CheckpointError, match="--norm-epsilon is 1e-05, but the checkpoint has 1e-06"):
        check_model_args(args, checkpoint)
