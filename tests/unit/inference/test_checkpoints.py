"""What a checkpoint's folder says about itself (its hash, its dtype, its config.json), and who made
samples."""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.inference import checkpoints
from megatron_dms.inference.baselines import load_plain
from megatron_dms.inference.checkpoints import fingerprint, read_config, same_dtype
from megatron_dms.inference.generation import pad_id
from megatron_dms.inference.loading import check_exported
from megatron_dms.provenance import made_by


def test_fingerprint(tmp_path: Path, monkeypatch) -> None:
    """Catches: two checkpoints of one training, alike but for a byte of the weights, taken for the same; the
    end of a text or the code changed unseen; a notice for each small file, none for a large one."""
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 << 20)
    marks = []
    for place in (None, 0, len(weights) // 2, 100_000, len(weights) - 1):
        if place is not None:
            weights[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(weights)
        marks.append(fingerprint(tmp_path))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "m.py"):
        (tmp_path / name).write_text("{ }")
        marks.append(fingerprint(tmp_path))
    (tmp_path / "m.py").rename(tmp_path / "n.py")
    marks.append(fingerprint(tmp_path))
    assert len(set(marks)) == len(marks)
    (tmp_path / "README.md").write_text("said later")
    said: list[str] = []
    assert fingerprint(tmp_path, said.append) == marks[-1] and said == []
    monkeypatch.setattr(checkpoints, "_LARGE", 3 << 20)
    fingerprint(tmp_path, said.append)
    assert said == [f"hashing {tmp_path / 'model.safetensors'}, 0.0 GB"]


def folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_same_dtype(tmp_path: Path) -> None:
    """Catches: models of two dtypes in one table under "auto", the older name of the key missed."""
    plain = folder(tmp_path / "plain", torch_dtype="torch.float32")
    same, other = (folder(tmp_path / name, dtype=name) for name in ("float32", "bfloat16"))
    assert same_dtype({"model": plain, "dms 4": same}, "auto") == "float32"
    assert same_dtype({"model": plain, "dms 4": other}, "float16") == "float16"
    with pytest.raises(ValueError, match=r"plain names float32, .*bfloat16 bfloat16: .* --dtype float32 or"):
        same_dtype({"model": plain, "dms 4": other}, "auto")
    for config, message in (({}, "names no dtype: "), ({"dtype": "float64"}, "names the dtype float64: ")):
        with pytest.raises(ValueError, match=message + "say which with --dtype float32|bfloat16|float16"):
            same_dtype({"model": folder(tmp_path / f"bad{len(config)}", **config)}, "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a checkpoint: its config.json: No such file"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list, expected an object"),
    ],
)
def test_config(text: str | None, message: str, tmp_path: Path) -> None:
    """Catches: one of its readers that ends in a traceback where the others name the fault."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for reader in (read_config, fingerprint, check_exported, lambda path: load_plain(path, "auto", "cpu")):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path)


def test_made_by(monkeypatch) -> None:
    """Catches: timings of one machine under the name of another."""
    found = made_by()
    assert found["commit"] and found["torch"] and found["machine"].endswith(f", {os.cpu_count()} CPUs")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert made_by("cuda:1") == found | {"machine": "GPU at cuda:1"}


def test_pad_id() -> None:
    """Catches: a pad id of 0 taken for none, or None given to the model."""
    for given, expected in ((None, 0), (0, 0), (7, 7)):
        assert pad_id(type("Tokenizer", (), {"pad_token_id": given})) == expected


def test_importance_without_merging() -> None:
    """Catches: weights of merging in a config.json that evicts, accepted and ignored."""
    entries = {"dms_window_size": 8, "dms_alpha_scale": 1.0, "dms_initial_alpha_offset": 5.0}
    for key, value in (("dms_importance_scale", 2.0), ("dms_importance_offset", 1.0)):
        with pytest.raises(
            ValueError, match=f"{key} is {value} with dms_method 'evict': only 'merge' weighs"
        ):
            DMSSettings.from_entries(entries | {key: value})
    default = {"dms_importance_scale": 1.0, "dms_importance_offset": 0.0}
    assert DMSSettings.from_entries(entries | default) == DMSSettings.from_entries(entries)
    merge = {"dms_method": "merge", "dms_predictor": "key_channel", "dms_window_size": 0}
    assert DMSSettings.from_entries(entries | merge | {"dms_importance_scale": 2.0}).importance_scale == 2.0
