"""Odd values wherever a conversion reads one.

Each value is taken and given back, or refused in one line. There is never a traceback, and never an output
that is begun and left.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_dms.conversion import export_hf, import_hf
from megatron_dms.conversion.families import config_keys, read_model
from megatron_dms.conversion.hf_folder import INDEX, HFFolder
from megatron_dms.conversion.rope import attention_factor, inverse_frequencies
from megatron_dms.formats.megatron_folder import SOURCE, TRACKER
from tests.support.foreign_dms_settings import FASTDMS, NVIDIA
from tests.support.hf_checkpoints import LLAMA3, MAKERS, YARN
from tests.support.odd_values import (
    DEEP,
    VALUES,
    convert,
    damaged,
    header,
    leaves_nothing,
    must,
    outcome,
    short,
    with_header,
)


def odd_configs(config: dict) -> Iterator[tuple[str, object, dict]]:
    """Yield a config.json with one value after the other replaced, including those of its RoPE object."""
    for key in config:
        for value in VALUES:
            kept = {
                name: config[name] for name in config if (key, name) != ("num_hidden_layers", "layer_types")
            }
            yield key, value, {**kept, key: value}
            if key in ("rope_parameters", "rope_scaling"):
                for inner in config[key]:
                    yield key, value, {**config, key: {**config[key], inner: value}}


def before_transformers_5(config: dict) -> dict:
    """Return the same model as older versions write it."""
    scaling = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    return old | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": config["dtype"]}


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "before"])
@pytest.mark.parametrize("name", MAKERS)
def test_config_json(name: str, old: bool, tmp_path: Path) -> None:
    """Catches: TypeError for a list where a set or a dict is asked, OverflowError of float(10**400), NaN or
    infinity let through as a number above 0, a loop over 10**30 layers.
    """
    rope = {} if name in ("llama", "mistral") else {"rope_parameters": dict(LLAMA3 if old else YARN)}
    source = MAKERS[name](tmp_path / "hf", torch.bfloat16, **rope)
    config = json.loads((source / "config.json").read_text())
    config |= {"attention_bias": False, "attention_dropout": 0.0, "layer_types": ["full_attention"] * 2}
    if name == "qwen2":
        del config["attention_bias"]
    if old:
        config = before_transformers_5(config)
    read_model(config)
    found, tried = {}, set()
    for key, value, changed in odd_configs(config):
        case = f"{key}={short(changed[key])} ({short(value)})"

        def read(changed: dict = changed) -> None:
            model = read_model(changed)
            model.family.megatron_args(model)
            assert math.isfinite(attention_factor(model.rope))
            assert (
                inverse_frequencies(model.rope, model.head_size if model.head_size < 10**4 else 64)
                .isfinite()
                .all()
            )

        found[case] = outcome(read)
        # a value that is not read comes back with its file: one such key stands for all
        kind = "without effect" if key in config_keys._WITHOUT_EFFECT else key
        if found[case] == "accepted" and (kind, repr(value)) not in tried:
            tried.add((kind, repr(value)))
            (source / "config.json").write_text(json.dumps(changed))
            work = tmp_path / "work"
            work.mkdir()
            found[case + ", converted"] = outcome(lambda work=work: convert(source, work))
            shutil.rmtree(work)
    assert len(found) > 300 and "accepted" in found.values()
    must(found, "accepted", "refused")


@pytest.mark.parametrize("separate", [False, True])
def test_dms_keys_of_config_json(separate: bool) -> None:
    """Catches: a ratio of NaN or infinity, a window of 10**400, a list for a choice."""
    base = {
        **json.loads('{"model_type": "qwen3", "rms_norm_eps": 1e-6, "hidden_size": 32}'),
        **dict.fromkeys(("num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"), 2),
        **{"max_position_embeddings": 64, "num_key_value_heads": 1, **NVIDIA, "dms_separate_alpha": separate},
        **{"dms_predictor": "linear" if separate else "query_channel", "dms_lag": 1},
    }
    read_model(base)
    found = {
        f"{key}={short(value)}": outcome(lambda key=key, value=value: read_model({**base, key: value}))
        for key in base
        for value in VALUES
    }
    must(found, "accepted", "refused")
    for key in ("dms_cr", "dms_tau", "dms_alpha_scale", "dms_initial_alpha_offset"):
        assert found[f"{key}=nan"] == found[f"{key}=inf"] == "refused", key


def test_dms_metadata_json(copies: Path, tmp_path: Path) -> None:
    """Catches: an export written with int(inf), a value that import takes and export then cannot say."""
    source, found = copies / "hf", {}
    cases: dict[str, object] = {f"config={short(value)}": {"config": value} for value in VALUES}
    for key, value in ((key, value) for key in FASTDMS["config"] for value in VALUES):
        cases[f"{key}={short(value)}"] = {**FASTDMS, "config": {**FASTDMS["config"], key: value}}
    for case, content in cases.items():
        (source / "dms_metadata.json").write_text(json.dumps(content))
        model = outcome(lambda: read_model(*(lambda f: (f.config, f.dms_metadata))(HFFolder(source))))
        found[case] = model
        if model == "accepted" and not case.startswith(("model", "context_len", "compression_mode")):
            work = tmp_path / "work"
            work.mkdir()
            found[case + ", converted"] = outcome(lambda work=work: convert(source, work))
            shutil.rmtree(work)
    must(found, "accepted", "refused")
    assert found["target_cr=inf"] == found["alpha_scale=nan"] == "refused"


def test_json_nested_too_deep(copies: Path, tmp_path: Path) -> None:
    """Catches: RecursionError, which is no ValueError, in any of the files that are parsed."""
    hf, single, megatron = (copies / name for name in ("hf", "tied", "megatron"))
    (hf / "dms_metadata.json").write_text("{}")
    places = [
        *((hf, name) for name in ("config.json", INDEX, "dms_metadata.json")),
        *((megatron, name) for name in ("hf/config.json", f"hf/{SOURCE}", "release/metadata.json")),
    ]
    found = {}
    for text in (DEEP, '{"a":' * 100_000, f'{{"model_type": {DEEP}'):
        for folder, name in places:
            found[f"{name}, {text[:9]}"] = damaged(tmp_path / "work", folder, name, text.encode())
        content = with_header(text, header(single)[1])
        found[f"header, {text[:9]}"] = damaged(tmp_path / "work", single, "model.safetensors", content)
    must(found, "refused")


def test_safetensors_headers(copies: Path, tmp_path: Path) -> None:
    """Catches: a shape, type or place of a header used before it is looked at; two lines for a name."""
    entries, rest = header(copies / "tied")
    name = next(key for key in entries if key != "__metadata__")
    found = {}
    odd: dict[str, object] = {f"header {short(value)}": value for value in VALUES}
    odd |= {f"entry {short(value)}": {**entries, name: value} for value in VALUES}
    for key in ("dtype", "shape", "data_offsets"):
        for value in (*VALUES, [None, None], [0, math.nan], [10**400, 10**400], [-1, 1], [0], [True, True]):
            odd[f"{key} {short(value)}"] = {**entries, name: {**entries[name], key: value}}
    odd["name of two lines"] = {**entries, "a\nb": entries[name]}
    odd["surplus, name of two lines"] = {
        **entries,
        "a\nb": {"dtype": "F32", "shape": [0], "data_offsets": [len(rest)] * 2},
    }
    for case, value in odd.items():
        content = with_header(json.dumps(value), rest)
        found[case] = damaged(tmp_path / "work", copies / "tied", "model.safetensors", content)
    for case, content in {"bytes": b"\xff\xfe" * 8, "empty": b"", "length": b"\xff" * 8 + rest}.items():
        found[case] = damaged(tmp_path / "work", copies / "tied", "model.safetensors", content)
    must(found, "refused")


def test_folders_in_the_place_of_files(copies: Path, tmp_path: Path) -> None:
    """Catches: IsADirectoryError from a reader that asks only whether something is there."""
    found = {}
    hf, single, megatron = (copies / name for name in ("hf", "tied", "megatron"))
    for source, name in (
        *((hf, name) for name in ("config.json", INDEX, "model-00001-of-00003.safetensors")),
        (single, "model.safetensors"),
        *((megatron, name) for name in (TRACKER, "release/.metadata", "release/__0_0.distcp")),
    ):
        (source / name).rename(tmp_path / "kept")
        (source / name).mkdir()
        convert_it = export_hf if source == megatron else import_hf
        found[name] = leaves_nothing(convert_it, source, tmp_path / "work")
        (source / name).rmdir()
        (tmp_path / "kept").rename(source / name)
    must(found, "refused")


def test_the_index(copies: Path, tmp_path: Path) -> None:
    """Catches: a set of unhashable values, sorting None among names, a file read from outside the folder."""
    index = json.loads((copies / "hf" / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    shutil.copy(copies / "hf" / file, copies / "x.safetensors")  # or it would be refused as missing
    (copies / "hf" / "sub").mkdir()
    shutil.copy(copies / "hf" / file, copies / "hf" / "sub" / "x.safetensors")
    odd = {}
    files = ("../x.safetensors", str(copies / "x.safetensors"), "sub/x.safetensors", ".", "..", "config.json")
    for value in (*VALUES, 3, *files, "a\0b", "a" * 300):
        odd[f"one tensor in {short(value)}"] = {**index, "weight_map": {**index["weight_map"], name: value}}
        moved = {key: value if put == file else put for key, put in index["weight_map"].items()}
        odd[f"a whole file in {short(value)}"] = {**index, "weight_map": moved}
    for value in VALUES:
        odd[f"weight_map {short(value)}"] = {**index, "weight_map": value}
        odd[f"index {short(value)}"] = value
    found = {
        case: damaged(tmp_path / "work", copies / "hf", INDEX, json.dumps(value).encode())
        for case, value in odd.items()
    }
    must(found, "refused")
