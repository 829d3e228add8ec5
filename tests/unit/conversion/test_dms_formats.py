"""DMS checkpoints of other projects are recognised, imported, and given back as they were or in another
format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms import hf
from megatron_dms.conversion import CheckpointError, checkpoint_args, export_hf, import_hf
from megatron_dms.conversion.dms_formats import read
from megatron_dms.conversion.hf_folder import read_dms_metadata, read_json
from megatron_dms.conversion_options import FORMATS
from tests.support.checkpoint_edits import DMS, files_of, rewrite, tensors_of
from tests.support.foreign_dms_settings import FASTDMS, NVIDIA
from tests.support.hf_checkpoints import edit_config, make_llama, make_qwen3

TRAINED = {"steps_per_cr": 100, "final_cr": 4.0, "anneal": "cr", "zeroing_steps": 0}


def make_nvidia(folder: Path, separate_alpha: bool) -> Path:
    """Make a checkpoint like nvidia/Qwen3-8B-DMS-8x: bfloat16, NVIDIA's keys, and code beside the weights."""
    make_qwen3(folder, torch.bfloat16)
    edit_config(folder, **NVIDIA, dms_separate_alpha=separate_alpha)
    for module in ("configuration_qwen3_dms", "modeling_qwen3_dms"):
        (folder / f"{module}.py").write_text("raise RuntimeError('the code of a checkpoint ran')\n")
    if separate_alpha:
        tensors = load_file(folder / "model.safetensors")
        for name, shape in (("dms_proj_alpha", (2, 32)), ("dms_proj_alpha_norm", (32,))):
            for layer in range(2):
                random = torch.randn(shape, generator=torch.Generator().manual_seed(layer)).bfloat16()
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = random
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_fastdms(folder: Path) -> Path:
    """Make a checkpoint like shisa-ai/Llama-3.2-1B-DMS-8x: a plain Llama and dms_metadata.json."""
    make_llama(folder, torch.bfloat16)
    (folder / "dms_metadata.json").write_text(json.dumps(FASTDMS))
    return folder


SOURCES = {
    "nvidia query_channel": lambda folder: make_nvidia(folder, separate_alpha=False),
    "nvidia linear": lambda folder: make_nvidia(folder, separate_alpha=True),
    "fastdms": make_fastdms,
}


def found_in(folder: Path):
    return read(read_json(folder / "config.json"), read_dms_metadata(folder))


@pytest.mark.parametrize("name", SOURCES)
def test_a_dms_checkpoint_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    """Catches: settings read from the wrong keys, a format taken for another, keys or code of ours added."""
    source = SOURCES[name](tmp_path / "hf")
    import_hf(source, tmp_path / "megatron")
    args = checkpoint_args(tmp_path / "megatron")
    expected = {"alpha_scale": 100.0, "alpha_offset": 5.0, "window": 16, "lag": 1, "temperature": 0.1}
    predictor = "linear" if name == "nvidia linear" else "query_channel"
    # FastDMS's own code judges pair t by token t, and its runtime zeroes the channel before RoPE only
    fastdms = {"lag": 0, "zeroing": "before_rope"} if name == "fastdms" else {}
    assert args.dms == expected | {"predictor": predictor, "granularity": "head"} | fastdms
    assert args.dms_reached_cr == 8
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("name", SOURCES)
def test_training_on_changes_the_ratio_and_no_other_key(name: str, tmp_path: Path) -> None:
    """Catches: keys added to, or lost from, a format whose readers are other people's programs."""
    source = SOURCES[name](tmp_path / "hf")
    import_hf(source, megatron := tmp_path / "megatron")
    stored = checkpoint_args(megatron)
    rewrite(megatron, {}, {"dms": {**stored.dms, **TRAINED}}, iteration=200)
    export_hf(megatron, tmp_path / "out")
    for file, key in (("config.json", None), ("dms_metadata.json", "config")):
        if not (source / file).exists():
            continue
        before, after = (read_json(place / file) for place in (source, tmp_path / "out"))
        before, after = (content[key] if key else content for content in (before, after))
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        assert changed <= {"dms_cr", "target_cr"}
        assert before.keys() == after.keys()
    assert (found_in(source).reached_cr, found_in(tmp_path / "out").reached_cr) == (8, 3)


@pytest.mark.parametrize("dms_format", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_format_into_every_other(name: str, dms_format: str, tmp_path: Path) -> None:
    """Catches: a setting lost on the way, a stale key, class or code file of the format before."""
    source = SOURCES[name](tmp_path / "hf")
    import_hf(source, tmp_path / "megatron")
    out = tmp_path / "out"
    cannot_say = {
        ("nvidia linear", "fastdms"): "fastdms knows only predictor 'query_channel'",
        ("nvidia query_channel", "fastdms"): "fastdms knows only lag 0",
        ("fastdms", "nvidia"): "nvidia knows only lag 1",
    }
    if (name, dms_format) in cannot_say:
        with pytest.raises(CheckpointError, match=cannot_say[name, dms_format]):
            export_hf(tmp_path / "megatron", out, dms_format=dms_format)
        assert not out.exists()
        return
    export_hf(tmp_path / "megatron", out, dms_format=dms_format)
    before, after = found_in(source), found_in(out)
    assert (after.fields, after.reached_cr, after.format) == (before.fields, before.reached_cr, dms_format)
    config = read_json(out / "config.json")
    ours = {file.name for file in hf.export_files()}
    runs_ours = hf.MODELING_MODULE in str(config.get("auto_map"))
    assert runs_ours == (dms_format != "fastdms" and before.format != dms_format)
    assert (ours <= {file.name for file in out.iterdir()}) == runs_ours
    if dms_format == "fastdms":
        assert not any(key.startswith("dms_") for key in config) and "auto_map" not in config
        assert config["architectures"][0] in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    assert (out / "dms_metadata.json").exists() == (dms_format == "fastdms")
    own_type = dms_format == "megatron_dms"
    assert config["model_type"] in (("llama_dms", "qwen3_dms") if own_type else ("llama", "qwen3"))
    if before.format != dms_format:
        assert ("Nothing says so." in (out / "README.md").read_text()) != own_type
    assert config.get("dms_zeroing") == (
        "before_rope" if (name, dms_format) == ("fastdms", FORMATS[0]) else None
    )
    import_hf(out, tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "twice", dms_format=before.format)
    assert found_in(tmp_path / "twice") == before
    assert all(
        torch.equal(tensor, tensors_of(tmp_path / "twice")[key]) for key, tensor in tensors_of(source).items()
    )


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    """Catches: a lag, granularity or predictor dropped in silence by a format without a key for it."""
    source = make_qwen3(tmp_path / "hf")
    import_hf(source, megatron := tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="holds no DMS model"):
        export_hf(megatron, tmp_path / "out", dms_format="nvidia")
    fields = {**NVIDIA_FIELDS, **TRAINED}
    for iteration, (change, dms_format, message) in enumerate(
        [
            ({"lag": 0}, "nvidia", "knows only lag 1"),
            ({"zeroing": "before_rope"}, "nvidia", "knows only zeroing 'around_rope'"),
            ({"predictor": "key_channel"}, "nvidia", "no key_channel"),
            ({"granularity": "layer"}, "fastdms", "knows only granularity 'head'"),
            ({"lag": 1}, "fastdms", "knows only lag 0"),
            ({"lag": 0}, "fastdms", "knows only zeroing 'before_rope'"),
        ]
    ):
        rewrite(megatron, {}, {"dms": {**fields, **change}}, iteration=iteration + 1)
        with pytest.raises(CheckpointError, match=message):
            export_hf(megatron, tmp_path / "out", dms_format=dms_format)
        assert not list(tmp_path.glob("out*"))


NVIDIA_FIELDS = {**DMS, "predictor": "query_channel"}


def drop_metadata_key(folder: Path, key: str) -> None:
    values = {name: value for name, value in FASTDMS["config"].items() if name != key}
    (folder / "dms_metadata.json").write_text(json.dumps({"config": values}))


ENTRIES = {"dms_window_size": 16, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}

BAD = {
    # message: (source, damage)
    "window_size'] under config": ("fastdms", lambda d: drop_metadata_key(d, "window_size")),
    "alpha_scale'] under config": ("fastdms", lambda d: drop_metadata_key(d, "alpha_scale")),
    "config is 3": ("fastdms", lambda d: (d / "dms_metadata.json").write_text('{"config": 3}')),
    "cannot be read as JSON": ("fastdms", lambda d: (d / "dms_metadata.json").write_text("{")),
    "schema_version": (
        "fastdms",
        lambda d: (d / "dms_metadata.json").write_text(json.dumps({**FASTDMS, "schema_version": 2})),
    ),
    "says window 32, but dms_metadata.json says 16": (
        "fastdms",
        lambda d: edit_config(d, **{**ENTRIES, "dms_window_size": 32}, dms_lag=0, dms_zeroing="before_rope"),
    ),
    "says lag 1, but dms_metadata.json means lag 0": ("fastdms", lambda d: edit_config(d, **ENTRIES)),
    "says zeroing 'around_rope', but dms_metadata.json means zeroing 'before_rope'": (
        "fastdms",
        lambda d: edit_config(d, **ENTRIES, dms_lag=0),
    ),
    "dms_alpha_scale, dms_initial_alpha_offset missing": (
        "fastdms",
        lambda d: edit_config(d, dms_window_size=16),
    ),
    "dms_proj_alpha": ("nvidia linear", lambda d: edit_config(d, dms_separate_alpha=False)),
    "tensors missing model.layers.0.self_attn.dms_proj_alpha": (
        "nvidia query_channel",
        lambda d: edit_config(d, dms_separate_alpha=True),
    ),
    "unknown keys": ("nvidia linear", lambda d: edit_config(d, dms_alpha_shift=1)),
}


@pytest.mark.parametrize("message", BAD)
def test_conflicting_or_partial_settings_are_refused(message: str, tmp_path: Path) -> None:
    """Catches: a default taken for a setting that is missing, one of two truths believed."""
    name, damage = BAD[message]
    source = SOURCES[name](tmp_path / "hf")
    damage(source)
    with pytest.raises(CheckpointError, match=message.replace("]", r"\]")):
        import_hf(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_predictor_tensors_without_dms_keys_are_refused(tmp_path: Path) -> None:
    """Catches: a DMS model whose config.json was replaced by its base model's, imported as a dense one."""
    source = make_nvidia(tmp_path / "hf", separate_alpha=True)
    config = read_json(source / "config.json")
    plain = {key: value for key, value in config.items() if not key.startswith("dms_")}
    (source / "config.json").write_text(json.dumps({**plain, "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"dms_proj_alpha.*says nothing of DMS"):
        import_hf(source, tmp_path / "out")


@pytest.mark.parametrize("dms_format", ["megatron_dms", "nvidia"])
def test_an_export_in_both_config_formats_runs(dms_format: str, tmp_path: Path) -> None:
    """Catches: an export of a retrofit in NVIDIA's format that our own code would read differently."""
    from transformers import AutoModelForCausalLM

    import_hf(make_qwen3(tmp_path / "hf"), megatron := tmp_path / "megatron")
    fields = {**NVIDIA_FIELDS, "alpha_offset": 0.0, "window": 2, **TRAINED}
    rewrite(megatron, {}, {"dms": fields}, iteration=300)
    export_hf(megatron, tmp_path / "out", dms_format=dms_format)
    keys = read_json(tmp_path / "out/config.json")
    assert ("dms_lag" in keys) == ("dms_predictor" in keys) == (dms_format == "megatron_dms")
    assert keys["dms_cr"] == 4 and isinstance(keys["dms_cr"], int)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.generate(torch.arange(3, 9)[None], max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert model.last_kv_stats.achieved_cr > 1.2


BASE_CARD = "---\nlicense: apache-2.0\nlicense_link: here\nlanguage: en\n---\n# Base\n"


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    """Catches: a card without base, ratio, window, recipe or licence; the base's own card lost; a card made
    anew although nothing was trained."""
    source = make_qwen3(tmp_path / "models--Owner--Base" / "snapshots" / "0123")
    (source / "README.md").write_text(BASE_CARD)
    import_hf(source, megatron := tmp_path / "megatron")
    export_hf(megatron, tmp_path / "dense")
    assert files_of(tmp_path / "dense") == files_of(source)
    trained = {**NVIDIA_FIELDS, **TRAINED, "train": "predictor", "teacher": "T", "kl": "teacher_student"}
    args = {"dms": trained, "global_batch_size": 64, "seq_length": 8192, "lr": 3e-5}
    rewrite(megatron, {}, args, iteration=200)
    export_hf(megatron, out := tmp_path / "out")
    card = (out / "README.md").read_text()
    for line in (
        "base_model: Owner/Base",
        "license: apache-2.0",
        "license_link: here",
        "| compression ratio asked for by the schedule | 3 |",
        "| window | 16 tokens |",
        "| who decides | the last channel of the first query head of each group |",
        "| trained | the predictor alone, by distillation from a frozen teacher (teacher_student) |",
        "| steps | 200 |",
        "| tokens a sample | 8192 |",
        "print(model.last_kv_stats)",
    ):
        assert line in card.splitlines(), line
    assert (out / "README_base.md").read_text() == BASE_CARD
    import_hf(out, tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "twice")
    assert files_of(tmp_path / "twice") == files_of(out)
    stored = checkpoint_args(tmp_path / "again").dms
    rewrite(tmp_path / "again", {}, {"dms": {**stored, **TRAINED}}, iteration=100)
    export_hf(tmp_path / "again", tmp_path / "more")
    assert "schedule | 2 |" in (tmp_path / "more/README.md").read_text()
    assert (tmp_path / "more/README_base.md").read_text() == BASE_CARD


@pytest.mark.parametrize(("window", "block"), [(256, 128), (512, None), (17, 16), (16, 8), (2, 1)])
def test_nvidias_block_size_is_below_the_window(window: int, block: int | None, tmp_path: Path) -> None:
    """NVIDIA's class asserts it, with 256 by default. Catches: a folder that does not load there."""
    import_hf(make_qwen3(tmp_path / "hf"), megatron := tmp_path / "megatron")
    rewrite(megatron, {}, {"dms": {**NVIDIA_FIELDS, "window": window, **TRAINED}}, iteration=300)
    export_hf(megatron, tmp_path / "out", dms_format="nvidia")
    assert read_json(tmp_path / "out/config.json").get("dms_paged_attention_block_size") == block
