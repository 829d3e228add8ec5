"""An exported folder works without the package: settings in config.json, code beside the weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from megatron_dms.hf import SUPPORTED_MODEL_TYPES, config_entries, export_files, modeling_dms
from megatron_dms.hf.configuration_dms import DMSSettings
from tests.support.exported_models import export
from tests.support.tiny_dms_models import random_tokens, tiny_model
from tests.support.tools import run_python

SETTINGS = {
    "predictor": "query_channel",
    "granularity": "head",
    "window": 512,
    "lag": 1,
    "alpha_scale": 100.0,
    "alpha_offset": 5.0,
    "temperature": 0.1,
    "target_cr": 8.0,
}
NVIDIA_KEYS = {
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 512,
    "dms_separate_alpha": False,
    "dms_alpha_per": "head",
    "dms_tau": 0.1,
    "dms_cr": 8,
    "dms_disable_eviction": False,
    "dms_paged_attention_block_size": 256,
    "dms_chunked_prefill": 4096,
    "dms_preallocate_for_tokens": None,
}

LOAD_AND_GENERATE = """
import json, sys, torch, transformers
sys.modules["megatron_dms"] = None  # importing the package is an error, wherever it is installed
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(ids, do_sample=False, max_new_tokens=9)
    print(json.dumps({"class": type(model).__name__, "module": type(model).__module__,
                      "transformers": transformers.__version__,
                      "tokens": tokens.tolist(), "stats": model.last_kv_stats.to_dict()}))
"""
PREDICTORS = {"qwen3": "query_channel", "llama": "linear", "mistral": "query_channel", "qwen2": "linear"}


@pytest.fixture(scope="module")
def loaded_without_the_package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return what one process that cannot import the package generates with the export of each family."""
    folder = tmp_path_factory.mktemp("exports")
    for family, predictor in PREDICTORS.items():
        export(tiny_model(family, predictor=predictor), folder / family)
    transformers_only = {"PYTHONPATH": str(Path(transformers.__file__).parents[1])}  # this one, no package
    ids, modules = json.dumps(random_tokens(2, 13).tolist()), {"HF_MODULES_CACHE": str(folder / "modules")}
    words = ["-c", LOAD_AND_GENERATE, ids, *(folder / family for family in PREDICTORS)]
    done = run_python(*words, cwd=folder, env=transformers_only | modules)
    assert done.status == 0, done.error
    return dict(zip(PREDICTORS, map(json.loads, done.out.splitlines()[-len(PREDICTORS) :]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", PREDICTORS)
def test_export_runs_without_the_package(
    family: str, loaded_without_the_package: dict[str, dict], tmp_path: Path
) -> None:
    """Catches a module missing from export_files, an import of the package in one of them, a wrong auto_map,
    and weights that do not come back."""
    model, ids_BT = tiny_model(family, predictor=PREDICTORS[family]), random_tokens(2, 13)
    export(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"{family}_dms"
    loaded = loaded_without_the_package[family]
    assert loaded["module"].startswith("transformers_modules.")
    assert loaded["class"] == type(model).__name__
    assert loaded["transformers"] == transformers.__version__
    assert loaded["tokens"] == model.generate(ids_BT, do_sample=False, max_new_tokens=9).tolist()
    assert loaded["stats"] == model.last_kv_stats.to_dict()


@pytest.mark.parametrize(("family", "base"), [("qwen3", Qwen3ForCausalLM), ("llama", LlamaForCausalLM)])
def test_weights_keep_the_base_names(family, base):
    """Catches any renaming: a base checkpoint must load, and only the linear predictor adds tensors."""
    names = set(base(tiny_model(family).config).state_dict())
    assert set(tiny_model(family).state_dict()) == names
    added = set(tiny_model(family, predictor="linear", attention_bias=True).state_dict()) - names
    alpha = {name.split("self_attn.")[1] for name in added if "dms_" in name}
    assert alpha == {"dms_proj_alpha.weight", "dms_proj_alpha.bias", "dms_proj_alpha_norm.weight"}


def test_predictor_tensors_must_match_the_config(tmp_path):
    """Catches a predictor left at its initial values because its tensors are not in the checkpoint."""
    tiny_model(predictor="linear").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.dms_proj_alpha.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing predictor tensors.*layers.1"):
        modeling_dms.Qwen3ForCausalLMDMS.from_pretrained(tmp_path)
    save_file(tensors, file, metadata={"format": "pt"})
    loaded, info = modeling_dms.Qwen3ForCausalLMDMS.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.state_dict()[name], tensors[name])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"dms_predictor": "query_channel", "dms_separate_alpha": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unexpected predictor tensors"):
        modeling_dms.Qwen3ForCausalLMDMS.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tp_plan"):
        modeling_dms.Qwen3ForCausalLMDMS.from_pretrained(tmp_path, tp_plan="auto")


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("predictor", ["query_channel", "linear", "key_channel"])
def test_config_entries_read_back(model_type, predictor):
    """Catches a key written under one name and read under another, and an auto_map to no class."""
    entries = config_entries(model_type, DMSSettings(**(SETTINGS | {"predictor": predictor})))
    module, class_name = entries["auto_map"]["AutoModelForCausalLM"].split(".")
    assert f"{module}.py" in {file.name for file in export_files()}
    assert entries["architectures"] == [class_name]
    assert getattr(modeling_dms, class_name).config_class().to_dict()["model_type"] == f"{model_type}_dms"
    assert entries["dms_separate_alpha"] == (predictor == "linear")
    assert json.loads(json.dumps(entries)) == entries
    assert DMSSettings.from_entries(entries) == DMSSettings(**(SETTINGS | {"predictor": predictor}))


def test_nvidia_config_is_read_as_it_is():
    """Catches a key of NVIDIA's format refused or misread, and another lag than its code has."""
    assert DMSSettings.from_entries(NVIDIA_KEYS | {"rope_theta": 1e6}) == DMSSettings(**SETTINGS)
    assert DMSSettings.from_entries(NVIDIA_KEYS | {"dms_separate_alpha": True}).predictor == "linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dms_windw_size": 3}, "dms_windw_size"),
        ({"dms_predictor": "linear"}, "dms_predictor.*dms_separate_alpha"),
        ({"dms_predictor": "key_channel", "dms_separate_alpha": True}, "dms_predictor.*dms_separate_alpha"),
        ({"dms_predictor": "value_channel"}, "dms_predictor.*value_channel"),
        ({"dms_alpha_per": "group"}, "dms_alpha_per.*group"),
        ({"dms_window_size": -1}, "dms_window_size"),
        ({"dms_window_size": 3.0}, "dms_window_size"),
        ({"dms_window_size": 3, "dms_lag": 5}, r"dms_lag is 5, expected between 0 and window \+ 1 = 4"),
        ({"dms_alpha_scale": float("nan")}, "dms_alpha_scale"),
        ({"dms_tau": 0}, "dms_tau"),
        ({"dms_cr": 0.5}, "dms_cr"),
        ({"dms_disable_eviction": 1}, "dms_disable_eviction"),
        ({"dms_separate_alpha": "no"}, "dms_separate_alpha"),
    ],
)
def test_bad_settings_are_refused_by_name(change, message):
    """Catches a check that is missing, or a message that does not say which key is wrong."""
    with pytest.raises(ValueError, match=message):
        DMSSettings.from_entries(NVIDIA_KEYS | change)


def test_missing_window_and_unknown_family_are_refused():
    """Catches a default window for a config that is no DMS config, and an export nobody could load."""
    with pytest.raises(ValueError, match="dms_window_size, dms_initial_alpha_offset missing"):
        DMSSettings.from_entries({"dms_alpha_scale": 100.0})
    with pytest.raises(ValueError, match=r"gpt2.*qwen3"):
        config_entries("gpt2", DMSSettings(**SETTINGS))


def test_exported_files_import_torch_and_transformers_only():
    """Catches an import that an exported folder cannot satisfy."""
    allowed = ("torch", "transformers", ".", *sys.stdlib_module_names)
    for file in export_files():
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert line.split()[1].startswith(allowed), f"{file.name}: {line}"
