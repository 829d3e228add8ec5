"""Megatron itself runs imported checkpoints at TP 1, TP 2 and PP 2, and is compared with transformers' own
models.

All checkpoints go through the three layouts at once, because a process that imports Megatron takes seconds
to start.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from megatron_dms.conversion import import_hf
from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.hf_folder import HFFolder
from megatron_dms.conversion.parity.outputs import Agreement, Outputs, agreement
from megatron_dms.conversion.parity.prompts import choose_prompts
from megatron_dms.conversion.parity.ranks import Task, megatron_outputs
from megatron_dms.conversion.parity.reference_model import reference_outputs
from megatron_dms.conversion.parity.verify import LAYOUTS, compare_logits
from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.inference.dmc_model import merging_class
from tests.support.hf_checkpoints import LINEAR, LLAMA3, MAKERS, SHAPE, YARN, edit_config, make_llama, save

TOLERANCE = 2e-5  # tighter than what `verify` asks for, as these models are small; logits are of order 1
TOKENS = 48
WINDOW, LAG = 6, 2


def make_dms(folder: Path, family: str, predictor: str, granularity: str = "head", **changes: object) -> Path:
    """Save a random model of the package's own DMS class."""
    settings = {"window": WINDOW, "lag": LAG, "alpha_scale": 100.0, "alpha_offset": 5.0, "temperature": 0.1}
    entries = config_entries(
        family, DMSSettings(predictor=predictor, granularity=granularity, target_cr=2.0, **settings)
    )
    sliding = {"sliding_window": None} if family == "mistral" else {}
    config = CONFIG_MAPPING[family](**{**SHAPE, "head_dim": 8, **sliding, **entries, **changes})
    network = getattr(modeling_dms, MODEL_CLASSES[family])(config)
    for name, weight in network.named_parameters():
        if name.endswith("dms_proj_alpha.weight"):  # 0 in a new model, which evicts nothing
            torch.nn.init.normal_(weight)
    return save(network, folder, torch.float32)


def make_merging(folder: Path) -> Path:
    """Save a random model that merges pairs, in a folder like that of an export."""
    settings = {"window": 0, "lag": 1, "alpha_scale": 100.0, "alpha_offset": 5.0, "temperature": 0.1}
    merging = {"method": "merge", "importance_scale": 2.0, "importance_offset": 0.5}
    entries = config_entries(
        "qwen3", DMSSettings(predictor="key_channel", target_cr=2.0, **settings, **merging)
    )
    config = CONFIG_MAPPING["qwen3"](**{**SHAPE, "head_dim": 8, **entries})
    save(merging_class("qwen3")(config), folder, torch.float32)
    edit_config(folder, architectures=entries["architectures"])  # transformers writes its class's name
    return folder


def make_fastdms(folder: Path) -> Path:
    """Save a model in FastDMS's format: a plain model with its settings in dms_metadata.json."""
    make_llama(folder)
    settings = {"window_size": WINDOW, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 2}
    (folder / "dms_metadata.json").write_text(json.dumps({"config": settings}))
    return folder


def add_code(folder: Path) -> Path:
    """Add code to a checkpoint; config.json names the code, and the code makes a file when it runs."""
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    edit_config(folder, auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "own.Own"))
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {
    **MAKERS,  # between them: tied and untied, biases, grouped queries, linear, llama3 and yarn RoPE
    "llama, tied, every head its own KV head": partial(
        MAKERS["llama"], tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-2
    ),
    # as published: frequencies must agree in every bit, or angles at position 131071 do not
    "llama, as Llama 3.2": partial(
        MAKERS["llama"],
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            **{**LLAMA3, "rope_theta": 5e5, "factor": 32.0},
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen3, untied, bfloat16, yarn as of Qwen3": partial(
        MAKERS["qwen3"],
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
        head_dim=128,
        max_position_embeddings=32768,  # the original context: yarn reaches past it all the same
        rope_parameters={**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    ),
    "qwen2, untied, dynamic": partial(
        MAKERS["qwen2"], tie_word_embeddings=False, rope_parameters={**LINEAR, "rope_type": "dynamic"}
    ),
    "DMS, qwen3, query_channel": partial(make_dms, family="qwen3", predictor="query_channel"),
    "DMS, qwen2, linear": partial(make_dms, family="qwen2", predictor="linear", rope_parameters=LINEAR),
    "DMS, llama, key_channel": partial(make_dms, family="llama", predictor="key_channel"),
    "DMS, mistral, linear, a decision per layer": partial(
        make_dms, family="mistral", predictor="linear", granularity="layer", rope_parameters=YARN
    ),
    "DMS, FastDMS's format": make_fastdms,
    "DMS's settings, merging": make_merging,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    """Return one LogitParity for each set of prompts, by checkpoint and layout."""
    root = tmp_path_factory.mktemp("parity")
    models, tasks, references = {}, {}, {}
    for number, (name, make) in enumerate(MAKE.items()):
        torch.manual_seed(number)
        folder = HFFolder(add_code(make(root / f"hf{number}")))
        models[name] = read_model(folder.config, folder.dms_metadata)
        import_hf(folder.path, root / f"megatron{number}")
        sets, _ = choose_prompts(models[name], TOKENS)
        tasks[name] = Task(root / f"megatron{number}", None, sets)
        references[name] = reference_outputs(folder, models[name], sets)
        assert all(outputs.logits_BTV.std() > 1 for outputs in references[name])  # or the limit means nothing
    assert not list(root.glob("*/executed")), "a checkpoint's own code was run"
    found: dict[str, dict[str, list]] = {name: {} for name in MAKE}
    for layout in LAYOUTS.values():
        outputs = megatron_outputs(layout, list(tasks.values()))
        for name, ours in zip(MAKE, outputs, strict=True):
            parity = compare_logits(models[name], layout, tasks[name].sets, references[name], ours)
            found[name][layout.name] = parity
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP 1", "TP 2", "PP 2"])
@pytest.mark.parametrize("name", MAKE)
def test_every_layout_gives_the_logits_of_transformers(name: str, layout: str, results: dict) -> None:
    """Catches: q|k|v not interleaved, gate and up swapped, a layer axis off by one (PP 2), epsilon, q and k
    norms swapped, RoPE scaling or its attention factor dropped, the tied output layer of the last stage; with
    DMS: window or lag off by one, the borrowed channel, settings that one side does not get.
    """
    for parity in results[name][layout]:
        print(f"{name}, {layout}, to position {parity.last_position}: {parity.agreement}")
        assert parity.agreement.passed and parity.agreement.max_abs_logit_diff < TOLERANCE
        assert parity.agreement.argmax_agreement > 0.99
        if name.startswith("DMS"):
            assert parity.agreement.decisions_differ == 0 and parity.agreement.compared == 1
            assert parity.agreement.evicted > 0.15


@pytest.mark.slow
def test_scaled_rope_is_compared_beyond_the_original_context(results: dict) -> None:
    """Catches: prompts that never leave the context in which scaling hardly shows."""
    last = {name: found["TP 1"][-1].last_position for name, found in results.items()}
    assert (last["llama"], last["mistral"], last["qwen2"], last["qwen3"]) == (255, 255, 255, TOKENS - 1)
    assert last["qwen3, untied, bfloat16, yarn as of Qwen3"] == 4 * 32768 - 1
    assert last["llama, as Llama 3.2"] == 131072 - 1
    assert last["qwen2, untied, dynamic"] == TOKENS - 1
    assert last["DMS, mistral, linear, a decision per layer"] == 32 + 64 - 1  # no gaps, the whole length
    for name in ("llama", "mistral", "DMS, FastDMS's format"):
        assert results[name]["TP 1"][-1].past_original_context


def outputs_of(decided: list[int], near_zero: list[int], T: int = 12) -> Outputs:
    """Return outputs of one layer, prompt and KV head whose logits are all equal.

    The numbers of some tokens evict clearly; those of others hardly decide.
    """
    flags = torch.zeros(2, 1, 1, 1, T, dtype=torch.bool)
    flags[0, ..., decided] = True
    flags[1, ..., near_zero] = True
    return Outputs(torch.zeros(1, T, 3), flags[0], flags[1])


def test_a_decision_within_rounding_may_flip_and_nothing_else() -> None:
    """With window 3 and lag 2, token 5 decides about pair 3, and query 7 is the first without that pair.
    Catches: a flip that fails a correct converter, one that hides a real difference before or of another
    size, a bound off by one."""
    reference = outputs_of([5], near_zero=[5])
    compare = partial(agreement, window=3, lag=2)
    assert compare(reference, reference) == Agreement(0.0, 1.0, True, 0, 1 / 12, 1.0)
    flipped = outputs_of([], near_zero=[])
    flipped.logits_BTV[:, 7:] = 1.0  # what follows a flip
    flipped.evict_LBGT[..., 9] = True  # and what it does to later decisions
    assert compare(reference, flipped) == Agreement(0.0, 1.0, True, 2, 0.0, 7 / 12)
    flipped.logits_BTV[:, 6] = 1.0
    assert not compare(reference, flipped).passed
    not_near = replace(reference, near_zero_LBGT=torch.zeros_like(reference.near_zero_LBGT))
    assert not compare(not_near, outputs_of([], near_zero=[])).passed
    without_pair = outputs_of([1, 5], near_zero=[])  # token 1 has no pair to decide about
    assert compare(reference, without_pair).decisions_differ == 0
    assert not compare(reference, replace(reference, logits_BTV=torch.full((1, 12, 3), torch.nan))).passed
