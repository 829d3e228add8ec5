"""Folders as training runs and tools leave them: their files stay behind, their prefixes are named."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_dms.conversion import CheckpointError, export_hf, import_hf
from tests.support.checkpoint_edits import files_of
from tests.support.hf_checkpoints import make_qwen3


def test_what_a_training_run_left_is_no_side_file(tmp_path: Path) -> None:
    """Catches: optimizer states, wandb's files or a whole checkpoint-500/ in every export; half of
    original/."""
    source = make_qwen3(tmp_path / "hf")
    expected = files_of(source)
    run = (
        "trainer_state.json",
        "optimizer.bin",
        "scheduler.pt",
        "events.out.tfevents.1",
        "wandb/run-1/a.log",
    )
    other = ("checkpoint-500/config.json", "checkpoint-500/optimizer.pt", "original/params.json")
    for name in (*run, *other, "original/consolidated.00.pth", "onnx/model.onnx", "onnx/x.json", "runs/a/b"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == expected


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "language_model."])
def test_prefixes_of_tools_are_named_in_one_line(prefix: str, tmp_path: Path) -> None:
    """Catches: a list of missing tensors in the place of the cause."""
    source = make_qwen3(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"each tensor's name begins with '{prefix}'"):
        import_hf(source, tmp_path / "out")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="names lack 'model"):
        import_hf(source, tmp_path / "out")
