"""`convert verify`: the card, the exit status, and what is refused."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dms.conversion import CheckpointError, export_hf, import_hf
from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.parity.prompts import Prompts, choose_prompts
from megatron_dms.conversion.parity.ranks import Layout, Task, megatron_outputs
from megatron_dms.conversion.parity.verify import verify
from megatron_dms.formats.torch_dist import Reader
from megatron_dms.hf.configuration_dms import DMSSettings
from tests.support.checkpoint_edits import rewrite
from tests.support.hf_checkpoints import VOCAB, edit_config, make_llama, make_qwen3
from tests.support.tools import Done, run_tool

TENSORS = 30  # of three Llama layers, with embedding, final norm and output layer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make hf/ and megatron/ of a model that TP 2 (one KV head) and PP 2 (three layers) cannot divide."""
    root = tmp_path_factory.mktemp("base")
    make_llama(root / "hf", torch.bfloat16, num_hidden_layers=3, num_key_value_heads=1)
    import_hf(root / "hf", root / "megatron")
    return root


def run(hf: Path, megatron: Path, *options: str) -> Done:
    return run_tool("convert", "verify", "--hf", hf, "--megatron", megatron, *options)


@pytest.mark.slow
def test_card_of_equal_checkpoints(base: Path) -> None:
    """Catches: a layout that does not divide the model as an error or in silence, a card that lacks a tensor
    or a comparison, a last line that no machine can read."""
    done = run(base / "hf", base / "megatron")
    assert done.status == 0, done.error
    last = json.loads(done.out.splitlines()[-1])
    path = base / "megatron" / "parity_card.json"
    card = json.loads(path.read_text())
    assert last == {**{key: card[key] for key in last if key != "card"}, "card": str(path)}
    assert {"tensors_equal", "tensors", "max_abs_logit_diff", "argmax_agreement"} <= last.keys()
    assert (card["passed"], card["tensors_equal"], card["layouts"]) == (True, True, ["TP 1"])
    assert len(card["tensor_list"]) == card["tensors"] == TENSORS
    assert {
        "name": "model.norm.weight",
        "equal": True,
        "dtype": "bfloat16",
        "shape": [32],
        "only_in": None,
    } in (card["tensor_list"])
    assert [(row["first_position"], row["last_position"], row["tokens"]) for row in card["logits"]] == [
        (0, 63, 64),
        (0, 255, 64),
    ]
    assert card["max_abs_logit_diff"] == max(row["max_abs_logit_diff"] for row in card["logits"]) < 1e-4
    reasons = {item["what"]: item["why"] for item in card["not_compared"]}
    assert "1 KV heads" in reasons["layout TP 2"] and "3 layers" in reasons["layout PP 2"]
    assert (card["model_type"], card["dtype"], card["tied"]) == ("llama", "bfloat16", False)
    assert card["rope"]["factor"] == 4.0 and card["versions"]["megatron-core"] and card["tolerance"] == 1e-4
    table = path.with_suffix(".md").read_text()
    assert table in done.out and "| TP 1 " in table and "not compared: layout PP 2" in table


@pytest.mark.slow
def test_an_export_in_a_half_type_of_fp32_training_agrees(base: Path, tmp_path: Path) -> None:
    """Catches: Megatron's model run with weights that the export has rounded."""
    megatron = shutil.copytree(base / "megatron", tmp_path / "megatron")
    reader = Reader(megatron / "release")
    noise = torch.Generator().manual_seed(0)
    trained = {
        key: (value := reader.tensor(key).float()) + 0.01 * torch.randn(value.shape, generator=noise)
        for key in reader.tensors
    }
    rewrite(megatron, trained, {}, iteration=7)
    export_hf(megatron, tmp_path / "hf")
    card = verify(tmp_path / "hf", megatron, layouts=["tp1"], card=tmp_path / "card.json")
    assert card.passed
    prompts = [Prompts(tuple(range(9)), VOCAB, 2)]
    rounded = dict.fromkeys(trained, torch.bfloat16)
    tasks = [Task(megatron, None, prompts), Task(megatron, None, prompts, rounded)]
    (kept,), (exported,) = megatron_outputs(Layout(1, 1), tasks)
    assert (kept.logits_BTV - exported.logits_BTV).abs().max() > 1e-3, "rounding must show"


@pytest.mark.slow
def test_one_flipped_bit_is_named(base: Path, tmp_path: Path) -> None:
    """Catches: a verify that cannot fail: one bit of an HF value, so one tensor and the logits."""
    other = shutil.copytree(base / "hf", tmp_path / "hf")
    file = max(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x01  # the exponent of the last value
    file.write_bytes(content)
    done = run(other, base / "megatron", "--layouts", "tp1", "--card", str(tmp_path / "card.json"))
    assert done.status == 1, done.error
    card = json.loads((tmp_path / "card.json").read_text())
    (unequal,) = [tensor["name"] for tensor in card["tensor_list"] if not tensor["equal"]]
    assert f"differs: {unequal}" in done.out and f"{TENSORS - 1} of {TENSORS} equal" in done.out
    assert not card["passed"] and not card["tensors_equal"] and card["max_abs_logit_diff"] > 1e-4


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, ["rotary_base", "500000.0"]),
        ({"rms_norm_eps": 1e-3}, {}, ["layernorm_epsilon"]),
        (
            {"dms_window_size": 16, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0},
            {},
            ["HF checkpoint has DMS"],
        ),
        ({}, {"prompt_tokens": 257}, ["--prompt-tokens", "256"]),
        ({}, {"card": "missing/card.json"}, ["missing/card.json", "No such file"]),
        ({}, {"card": "card.txt"}, ["card.txt", ".json"]),
        ({}, {"card": "folder.json"}, ["folder.json"]),
    ],
)
def test_refusals(changes: dict, options: dict, words: list[str], base: Path, tmp_path: Path) -> None:
    """Catches: a wrong theta or epsilon on one side that costs a long run to be found, or a card that cannot
    be written and is found out afterwards."""
    hf = shutil.copytree(base / "hf", tmp_path / "hf")
    edit_config(hf, **changes)
    (tmp_path / "folder.json").mkdir()
    if "card" in options:
        options = {"card": tmp_path / options["card"]}
    with pytest.raises(CheckpointError) as error:
        verify(hf, base / "megatron", **{"card": tmp_path / "card.json", **options})
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "hf"]


def test_read_only_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the default place of the card taken for granted. (Root may write to any folder.)"""

    def refuse(path: Path) -> None:
        assert path.parent == base / "megatron"
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(CheckpointError, match="Permission denied; name another place with --card"):
        verify(base / "hf", base / "megatron")


def test_dms_settings_must_agree(tmp_path: Path) -> None:
    """Catches: a window of one side only, which shows in no tensor and, in short prompts, in no logit."""
    settings = {"dms_lag": 1, "dms_predictor": "query_channel", "dms_alpha_scale": 100.0}
    hf = make_qwen3(tmp_path / "hf")
    edit_config(hf, dms_window_size=16, dms_initial_alpha_offset=5.0, **settings)
    edit_config(hf, architectures=["Qwen3ForCausalLMDMS"])
    import_hf(hf, tmp_path / "megatron")
    edit_config(hf, dms_window_size=17)
    with pytest.raises(CheckpointError, match=r"window is 17 .* and 16"):
        verify(hf, tmp_path / "megatron")


def test_prompts_of_dms_models(tmp_path: Path) -> None:
    """Catches: prompts that stay inside the window where they need not, a comparison given up in silence."""
    plain = read_model(json.loads((make_llama(tmp_path / "hf") / "config.json").read_text()))
    model = replace(plain, positions=8192, dms=DMSSettings(window=512))
    sets, left_out = choose_prompts(model, 64)
    assert [len(prompts.positions) for prompts in sets] == [512 + 64] and not left_out
    rope = {**plain.rope, "original_max_position_embeddings": 2048}
    sets, left_out = choose_prompts(replace(model, dms=DMSSettings(window=2000), rope=rope), 64)
    assert [len(prompts.positions) for prompts in sets] == [64]
    reasons = {item.what: item.why for item in left_out}
    assert "window of 2000" in reasons["attention after an eviction"]
    assert reasons["positions from 2048 on"] == "DMS models take no gaps between positions"


@pytest.mark.slow
def test_error_of_one_rank_is_one_line_and_ends_the_others(tmp_path: Path) -> None:
    """The first stage meets a token that the model does not have, while the second stage waits for the
    first. Catches: a wait without end, a traceback in the place of the reason."""
    import_hf(make_qwen3(tmp_path / "hf"), tmp_path / "megatron")
    prompts = Prompts(positions=tuple(range(8)), vocab=100 * VOCAB)
    with pytest.raises(
        CheckpointError, match=r"^Megatron's model failed at PP 2: IndexError: index out"
    ) as error:
        megatron_outputs(Layout(tp=1, pp=2), [Task(tmp_path / "megatron", None, [prompts])])
    assert "\n" not in str(error.value)
