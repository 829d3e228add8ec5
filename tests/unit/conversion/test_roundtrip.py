"""Import and then export gives back every byte; the fused layouts are compared with loops."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms import hf
from megatron_dms.conversion import CheckpointError, checkpoint_args, export_hf, families, import_hf
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.megatron_tensors import MegatronTensors
from megatron_dms.conversion.parity.verify import compare_tensors
from megatron_dms.conversion.transforms import FusedQKV, Vocabulary
from megatron_dms.formats.torch_dist import Reader
from megatron_dms.hf.configuration_dms import DMSSettings
from tests.support.checkpoint_edits import DMS, files_of, join, rewrite, tensors_of
from tests.support.hf_checkpoints import MAKERS, SHAPE, VOCAB, edit_config, make_llama, make_qwen3, save
from tests.support.tools import ROOT, run_tool


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_import_then_export_gives_back_every_file_byte_for_byte(make, dtype, tmp_path: Path) -> None:
    """Catches: a cast, a swapped pair of parts, text-mode copies, a lost side file, other files."""
    source = make(tmp_path / "hf", dtype)
    report = import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    assert report.tensors == len(tensors_of(source)) and report.bytes > 0


def test_fused_qkv_against_a_loop() -> None:
    """Catches: q|k|v in blocks instead of per group (`dim=1` -> 0 in join), or heads and groups swapped."""
    groups, per_group, size, hidden = 3, 2, 4, 5
    q = torch.randn(groups * per_group * size, hidden)
    k, v = torch.randn(groups * size, hidden), torch.randn(groups * size, hidden)
    expected = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            expected += [q[head * size + i] for i in range(size)]
        expected += [k[group * size + i] for i in range(size)] + [v[group * size + i] for i in range(size)]
    shapes = tuple(tuple(t.shape) for t in (q, k, v))
    row = FusedQKV("decoder.layers.x", ("q", "k", "v"), shapes, groups)
    assert torch.equal(join(row, [q, k, v]), torch.stack(expected))
    assert torch.equal(
        torch.cat([(q, k, v)[part][a:b] for part, a, b in row.segments_within(5, 21)]),
        torch.stack(expected)[5:21],
    )


def test_gate_comes_before_up_and_layers_are_in_order(tmp_path: Path) -> None:
    """Catches: [up; gate], or layer i stored as another layer; both would survive a mere round trip."""
    source = make_qwen3(tmp_path / "hf")
    import_hf(source, tmp_path / "megatron")
    found = Reader(tmp_path / "megatron" / "release").tensor("decoder.layers.mlp.linear_fc1.weight")
    hf_tensors = tensors_of(source)
    for layer in range(2):
        parts = [hf_tensors[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(found[layer], torch.cat(parts))


def test_padding_of_the_vocabulary_is_cut_and_lost_rows_are_refused(tmp_path: Path) -> None:
    """Catches: padding rows in the export (`[:rows]` gone), or an export with rows missing."""
    source = make_llama(tmp_path / "hf")
    import_hf(source, megatron := tmp_path / "megatron")
    reader = Reader(megatron / "release")
    padded = {}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[key] = torch.cat([reader.tensor(key), torch.full((61, 32), 7.0)])
    rewrite(megatron, padded, {"padded_vocab_size": VOCAB + 61}, iteration=3)
    export_hf(megatron, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    row = Vocabulary("output_layer.weight", ("lm_head.weight",), ((VOCAB, 32),))
    with pytest.raises(CheckpointError, match=f"--vocab-size {VOCAB}"):
        row.check_rows(128)


def test_a_tied_output_layer_that_is_written_out_comes_back(tmp_path: Path) -> None:
    """Catches: refusing, or losing, the copy that some tied checkpoints carry; accepting a wrong one."""
    source = make_qwen3(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][3] = 0.0
    tensors["model.embed_tokens.weight"][4, 0] = float("nan")  # equals itself here
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "megatron")
    assert "output_layer.weight" not in Reader(tmp_path / "megatron" / "release").tensors
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    tensors["lm_head.weight"][3, 0] = -0.0  # other bits than 0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true"):
        import_hf(source, tmp_path / "other")


def test_trained_fp32_weights_are_exported_in_the_models_type_and_only_they_change(tmp_path: Path) -> None:
    """Catches: an export in the training's type, or a tensor of a layer exported as another's."""
    source = make_qwen3(tmp_path / "hf", torch.bfloat16)
    import_hf(source, megatron := tmp_path / "megatron")
    key = "decoder.layers.mlp.linear_fc2.weight"
    trained = Reader(megatron / "release").tensor(key).float()
    trained[1] += 0.5
    rewrite(megatron, {key: trained}, {}, iteration=500)
    export_hf(megatron, tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(after[changed[0]], trained[1].bfloat16())
    with pytest.raises(CheckpointError, match="iter_0000400"):
        export_hf(megatron, tmp_path / "none", iteration=400)


def test_a_retrofitted_checkpoint_is_exported_with_predictor_settings_and_code(tmp_path: Path) -> None:
    """Catches: DMS keys or predictor tensors lost, other keys of config.json touched, code not copied."""
    source = make_qwen3(tmp_path / "hf", torch.bfloat16)
    import_hf(source, megatron := tmp_path / "megatron")
    assert not hasattr(checkpoint_args(megatron), "dms")
    prefix = "decoder.layers.self_attention.dms_predictor."
    predictor = {prefix + "norm.weight": torch.ones(2, 32), prefix + "proj.weight": torch.randn(2, 2, 32)}
    rewrite(megatron, predictor, {"dms": {**DMS, "final_cr": 8.0}, "dms_reached_cr": 4.0}, iteration=7)
    export_hf(megatron, out := tmp_path / "out")
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    entries = hf.config_entries("qwen3", DMSSettings(target_cr=4.0, **DMS))
    assert config == {**base, **entries} and config["dms_separate_alpha"] is True
    assert {file.name for file in hf.export_files()} <= {file.name for file in out.iterdir()}
    exported = tensors_of(out)
    assert set(exported) - set(tensors_of(source)) == {
        f"model.layers.{n}.self_attn.dms_proj_alpha{end}"
        for n in range(2)
        for end in (".weight", "_norm.weight")
    }
    projection = exported["model.layers.1.self_attn.dms_proj_alpha.weight"]
    assert torch.equal(projection, predictor[prefix + "proj.weight"][1].bfloat16())
    import_hf(out, tmp_path / "again")
    args = checkpoint_args(tmp_path / "again")
    assert args.dms == DMS and args.dms_reached_cr == 4.0
    export_hf(tmp_path / "again", tmp_path / "twice")
    assert files_of(tmp_path / "twice") == files_of(out)


def test_command_line_ends_with_json_or_one_line_of_error(tmp_path: Path) -> None:
    """Catches: a traceback, the wrong exit status, or chatter after the JSON line."""
    source = make_qwen3(tmp_path / "hf")
    done = run_tool("convert", "import", "--hf", source, "--megatron", tmp_path / "m")
    assert done.status == 0 and done.error == ""
    assert json.loads(done.out.splitlines()[-1]).keys() == {
        "bytes",
        "tensors",
        "seconds",
        "non_finite_values",
    }
    edit_config(source, sliding_window_size=4)
    for arguments in (
        ["import", "--hf", source, "--megatron", tmp_path / "m2"],
        ["export", "--hf", tmp_path / "x"],
        ["export", "--hf", source, "--megatron", tmp_path / "m"],  # the output is not empty
        ["verify", "--hf", tmp_path / "x", "--megatron", tmp_path / "m", "--unknown"],
    ):
        done = run_tool("convert", *arguments)
        assert done.status == 2 and done.out == ""
        assert done.error.startswith("error: ") and done.error.count("\n") == 1


def test_the_family_that_the_docs_add_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the block of docs/conversion.md. Catches: an example that no longer works."""
    from transformers import SeedOssConfig, SeedOssForCausalLM

    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page.split("## Adding a family")[1], re.DOTALL)
    scope: dict = {}
    exec(block, scope)
    sizes = {**SHAPE, "num_attention_heads": 6, "head_dim": 8}
    source = save(SeedOssForCausalLM(SeedOssConfig(**sizes)), tmp_path / "hf", torch.bfloat16)
    with pytest.raises(CheckpointError, match="'seed_oss' is unknown"):
        import_hf(source, tmp_path / "megatron")
    monkeypatch.setitem(families.FAMILIES, "seed_oss", scope["FAMILY"])
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    edit_config(source, attention_out_bias=True)
    with pytest.raises(CheckpointError, match="attention_out_bias is True"):
        import_hf(source, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frequencies_that_older_checkpoints_carry_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """meta-llama/Llama-2-7b-hf is such a checkpoint. Catches: refusing the frequencies, losing them,
    taking those of another RoPE."""
    source = make_qwen3(tmp_path / "hf", torch.float16)
    tensors = load_file(source / "model.safetensors")
    frequencies = (1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)).to(dtype)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    stored = MegatronTensors.open(tmp_path / "megatron", None, source)
    assert all(found.equal for found in compare_tensors(HFFolder(source), stored, imported=True))
    edit_config(source, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    with pytest.raises(CheckpointError, match="inv_freq holds other frequencies than rope_theta 20000"):
        import_hf(source, tmp_path / "other")
