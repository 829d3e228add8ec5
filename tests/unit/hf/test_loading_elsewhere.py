"""An export never runs as its base model: where our code does not run, loading fails and says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from torch import equal
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_dms.hf import MODEL_CLASSES, base_model_type
from megatron_dms.inference.loading import load_tokenizer
from tests.support.exported_models import export, export_with_tokenizer
from tests.support.tiny_dms_models import random_tokens, tiny_model
from tests.support.tools import ROOT

OTHERS = (
    *("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
    "AutoModelForQuestionAnswering",
)


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of each family."""
    path = tmp_path_factory.mktemp(f"export_of_{request.param}")
    export(tiny_model(request.param), path)
    return path


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM", *OTHERS])
def test_without_the_flag(name: str, folder: Path) -> None:
    """Catches: a model type that transformers knows, with which it builds its own model in silence."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        getattr(transformers, name).from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model(name: str, folder: Path) -> None:
    """Catches: transformers' own backbone, or a reward model on it, through a class that is not listed."""
    auto = getattr(transformers, name)
    with pytest.raises(ValueError, match="holds a causal language model, and no other kind"):
        auto.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="holds a causal language model, and no other kind"):
        auto.from_config(config, trust_remote_code=True)


@pytest.mark.parametrize("name", ["AutoModelForMaskedLM", "AutoModelForImageTextToText"])
def test_a_kind_that_the_base_model_has_not(name: str, folder: Path) -> None:
    """Catches: an Auto class that falls back to a model of its own choice."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)


def test_with_the_flag(folder: Path, tmp_path: Path) -> None:
    """Save and load again, twice. Catches: a model type that is lost when transformers saves, and a config
    class that does not go with the model's."""
    tokens, found = random_tokens(2, 20), []
    for again in (folder, tmp_path / "once", tmp_path / "twice"):
        model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        found.append(model.generate(tokens, do_sample=False, max_new_tokens=9))
        config = json.loads((again / "config.json").read_text())
        assert (
            config["model_type"].endswith("_dms") and base_model_type(config["model_type"]) in MODEL_CLASSES
        )
        if again.name != "twice":
            export(model, tmp_path / ("once" if again == folder else "twice"))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_an_export_of_an_earlier_version_is_loaded(tmp_path: Path) -> None:
    """Their model type is the base model's. Catches: folders that people have, refused by new code."""
    model = tiny_model()
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": config["auto_map"]["AutoModelForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen3", "auto_map": auto_map}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    tokens = random_tokens(1, 20)
    assert equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "tokenizer_class",
    ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", None],
)
@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_the_base_model_s_tokens(family: str, tokenizer_class: str | None, tmp_path: Path) -> None:
    """transformers 5 picks the class by model type where tokenizer_config.json names an unlikely one.
    Catches: an export that is evaluated on other tokens than those that its base was trained on."""
    exported, base = tmp_path / "export", tmp_path / "base"
    exported.mkdir()
    export_with_tokenizer(exported, family=family)
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "tokenizer_class"}
    settings |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (exported / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(exported, base)
    config = json.loads((exported / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("dms_")}
    (base / "config.json").write_text(json.dumps({**plain, "model_type": family}))
    text = "a = 3 + 4; b = a * 2"
    expected = AutoTokenizer.from_pretrained(base)
    for found in (
        AutoTokenizer.from_pretrained(exported, trust_remote_code=True),
        load_tokenizer(exported),
    ):
        assert type(found) is type(expected)
        assert found(text)["input_ids"] == expected(text)["input_ids"]


@pytest.mark.parametrize("flag", [True, False])
def test_the_tokenizer_needs_no_code(flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a tokenizer that is looked up by a model type that no library knows, and a question on the
    terminal, which transformers 5 asks for 15 seconds where it is told neither."""
    tokenizer = AutoTokenizer.from_pretrained(export_with_tokenizer(tmp_path), trust_remote_code=flag)
    assert tokenizer.decode(tokenizer("1 + 2")["input_ids"])
    assert load_tokenizer(tmp_path)("1 + 2")["input_ids"] == tokenizer("1 + 2")["input_ids"]
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.skipif(
    hasattr(transformers.GenerationMixin, "_prepare_position_ids_for_generation"),
    reason="transformers 5 keeps one code for each content",
)
def test_two_exports_of_one_name(tmp_path: Path) -> None:
    """transformers 4 runs one code for both. Catches: the second one's settings with the first one's code,
    and a first model that goes on with the second one's functions."""
    for name in "ab":
        path = tmp_path / name / "export"
        path.mkdir(parents=True)
        export(tiny_model(), path)
        with (path / "stats_dms.py").open("a") as file:
            file.write(f"\nMARK = {name!r}\n")
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"for name in 'aab': AutoModelForCausalLM.from_pretrained(f'{tmp_path}/{{name}}/export', "
        "trust_remote_code=True); print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["a", "a"]
    assert "ImportError: another export, whose folder has the same name" in done.stderr
    shutil.rmtree(tmp_path / "a")


def test_positions_in_generate() -> None:
    """Catches: positions of a prompt, right or counted from elsewhere, with which transformers 4 rotates
    every new token as the prompt's last one."""
    model, tokens = tiny_model(), random_tokens(2, 13)
    positions = tokens.new_zeros(2, 13) + tokens.new_tensor(range(13))
    expected = model.generate(tokens, do_sample=False, max_new_tokens=9)
    given = model.generate(tokens, position_ids=positions, do_sample=False, max_new_tokens=9)
    assert equal(given, expected)
    mask = tokens.new_ones(2, 13)
    mask[0, :4] = 0
    padded = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=9)
    given = model.generate(
        tokens, attention_mask=mask, position_ids=padded, do_sample=False, max_new_tokens=9
    )
    assert equal(given, expected)
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        with pytest.raises(ValueError, match="do not count the tokens of the prompt from 0"):
            model.generate(tokens, position_ids=positions + 3, do_sample=False, max_new_tokens=9)
