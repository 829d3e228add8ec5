"""The models of each recipe in examples/, built at the recipe's real layout without memory for weights.

Each model is compared with transformers' model of the same config.json, name by name and shape by shape,
and with the planner's account, byte by byte.
"""

import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.memory import stage_memory
from megatron_dms.planning.models import preset
from tests.support.recipe_cases import (
    EXAMPLES,
    MODELS,
    RECIPES,
    ROOM,
    Recipe,
    every_recipe,
    hf_shapes,
    launched,
    read_env,
)
from tests.support.tools import ROOT, run_python

pytestmark = pytest.mark.slow

TOKENIZER = EXAMPLES / "tiny_reasoner" / "base"


def write_hf(folder: Path, recipe: str) -> None:
    """Write a HF folder with every tensor of the model, all holes: the file has its length and takes no
    disk."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in hf_shapes(recipe).items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    for source in (EXAMPLES / recipe / "config.json", *TOKENIZER.glob("tokenizer*.json")):
        (folder / source.name).write_bytes(source.read_bytes())


def write_data(prefix: Path) -> None:
    """Write one document of seven tokens, all of them targets."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    for end, kind in (("", np.int32), ("_loss_mask", np.uint8)):
        builder = IndexedDatasetBuilder(f"{prefix}{end}.bin", dtype=kind)
        builder.add_document(torch.ones(7, dtype=torch.int64), [7])
        builder.finalize(f"{prefix}{end}.idx")


BROKEN = {  # -> (flags behind those of qwen3-8b/adapter, what is said)
    "TP 3": ("--tensor-model-parallel-size 3", "num_attention_heads = 32, which it must divide"),
    "TP 16": ("--tensor-model-parallel-size 16", "num_query_groups = 8, which it must divide"),
    "PP 5": ("--pipeline-model-parallel-size 5", "has 36 layers, which it must divide"),
    "batch": ("--global-batch-size 7", "Megatron refuses these flags: "),
    "too long": ("--seq-length 65536", "the model has 40960 positions"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Return what each rank of one model (TP x PP) has, for every recipe and every case of BROKEN."""
    folder = tmp_path_factory.mktemp("recipes")
    cases = {}
    for model in MODELS:
        write_hf(folder / "hf" / model.local, model.folder)
        write_data(folder / "data" / model.folder)
    for name, recipe in RECIPES.items():
        layout = recipe.layout
        stage = layout.tp * layout.cp * layout.dp  # ranks of one; within it those of a TP group are adjacent
        ranks = [first * stage + k for first in range(layout.pp) for k in range(layout.tp)]
        cases[name] = {"flags": launched(name), "ranks": layout.ranks, "ranks_to_build": ranks}
    good = cases["qwen3-8b/adapter"]
    for name, (flags, _) in BROKEN.items():
        cases[name] = good | {"flags": good["flags"] + flags.split(), "ranks_to_build": [0]}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = ROOT / "tests" / "support" / "recipe_builds.py"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # no GPU: the same path everywhere
    done = run_python(script, "cases.json", "built.json", cwd=folder, env=hidden, timeout=600)
    assert done.status == 0, done.error
    return json.loads((folder / "built.json").read_text())


def expected_shapes(recipe: Recipe, stage: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Derive Megatron's tensors of one stage from transformers' tensors.

    Returns the shape on one rank, and whether TP divides the tensor.
    """
    hf, layout = hf_shapes(recipe.model.folder), recipe.layout
    tp, layer = layout.tp, "model.layers.0."
    found: dict[str, tuple[tuple[int, ...], bool]] = {}

    def divided(name: str, axis: int, *sources: str) -> None:
        shape = list(hf[sources[0]])
        shape[0] = sum(hf[source][0] for source in sources)
        assert shape[axis] % tp == 0, f"{name}: {shape[axis]} is not divisible by TP {tp}"
        shape[axis] //= tp
        found[name] = tuple(shape), True

    def table(name: str, source: str) -> None:
        rows, hidden = hf[source]
        multiple = 128 * tp
        found[name] = (-(-rows // multiple) * multiple // tp, hidden), True

    count = sum(name.endswith("mlp.down_proj.weight") for name in hf)
    assert count % layout.pp == 0
    for k in range(count // layout.pp):
        ours, att = f"decoder.layers.{k}.", f"{layer}self_attn."
        for kind in ("weight", "bias"):
            parts = [f"{att}{part}_proj.{kind}" for part in "qkv"]
            if parts[0] in hf:
                divided(f"{ours}self_attention.linear_qkv.{kind}", 0, *parts)
        divided(f"{ours}self_attention.linear_proj.weight", 1, f"{att}o_proj.weight")
        divided(f"{ours}mlp.linear_fc1.weight", 0, *(f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up")))
        divided(f"{ours}mlp.linear_fc2.weight", 1, f"{layer}mlp.down_proj.weight")
        for name, source in (
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm"),
            ("self_attention.q_layernorm.weight", "self_attn.q_norm"),
            ("self_attention.k_layernorm.weight", "self_attn.k_norm"),
        ):
            if f"{layer}{source}.weight" in hf:
                found[ours + name] = hf[f"{layer}{source}.weight"], False
    if stage == 0:
        table("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    if stage == layout.pp - 1:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"], False
        if "lm_head.weight" in hf:
            table("output_layer.weight", "lm_head.weight")
    return found


def with_predictor(recipe: Recipe, shapes: dict) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Add the predictor: G x hidden, a bias where the queries have one, and a norm of its own."""
    config = json.loads((EXAMPLES / recipe.model.folder / "config.json").read_text())
    groups, hidden = config["num_key_value_heads"], config["hidden_size"]
    assert groups % recipe.layout.tp == 0
    of_rank, found = groups // recipe.layout.tp, dict(shapes)
    for name in shapes:
        if name.endswith("linear_proj.weight"):
            own = name.replace("linear_proj.weight", "dms_predictor.")
            found[f"{own}norm.weight"] = (hidden,), False
            found[f"{own}proj.weight"] = (of_rank, hidden), True
            if name.replace("linear_proj.weight", "linear_qkv.bias") in shapes:
                found[f"{own}proj.bias"] = (of_rank,), True
    return found


def split(rank: dict) -> tuple[dict[str, list], dict[str, list]]:
    """Return the parameters of student and teacher by name: shape, bytes of an element, trained or not."""
    parts: tuple[dict, dict] = ({}, {})
    for name, *rest in rank["parameters"]:
        of_teacher = name.startswith("_teacher_model.")
        parts[of_teacher][name.removeprefix("_teacher_model.")] = rest
    return parts


def check_shapes(recipe: Recipe, ranks: list[dict]) -> None:
    """Check every tensor of student and teacher on every rank; all ranks together hold the whole model."""
    layout, kind = recipe.layout, recipe.setting.recipe
    places = [(rank["stage"], rank["tp_rank"]) for rank in ranks]
    assert places == [(stage, k) for stage in range(layout.pp) for k in range(layout.tp)]
    whole = 0
    for rank in ranks:
        assert not rank["not on meta"]
        plain = expected_shapes(recipe, rank["stage"])
        own = with_predictor(recipe, plain) if kind.linear else plain
        student, teacher = split(rank)
        assert {name: tuple(found[0]) for name, found in student.items()} == {
            name: shape for name, (shape, _) in own.items()
        }
        assert {name: tuple(found[0]) for name, found in teacher.items()} == {
            name: shape for name, (shape, _) in plain.items() if kind.own_teacher
        }
        for shape, divided in own.values():
            whole += prod(shape) if divided or rank["tp_rank"] == 0 else 0
    model = recipe.setting.model
    padding = (model.padded_vocab(layout.tp) - model.vocab) * model.hidden * (1 if model.tied else 2)
    copy = model.padded_vocab(layout.tp) * model.hidden if model.tied and layout.pp > 1 else 0
    predictors = model.layers * model.predictor_parameters() if kind.linear else 0
    assert whole - padding - copy - predictors == model.parameters()


@every_recipe
def test_shapes(built: dict[str, list], name: str) -> None:
    """Compares student and teacher on all ranks of a TP x PP group with transformers' model, divided by
    hand. Catches: a config.json or a layout that does not divide, a stage with the wrong layers, a tensor
    that is not divided, a teacher that is missing, or is a copy where it should be the student itself."""
    assert not [found for found in built[name] if isinstance(found, str)], built[name]
    check_shapes(RECIPES[name], built[name])


def test_a_wrong_shape_is_seen(built: dict[str, list]) -> None:
    """Catches: a check of shapes that cannot fail."""
    for name, index in (("qwen-r1-32b/paper", 0), ("qwen-r1-32b/paper", -1), ("qwen3-8b/adapter", 3)):
        ranks = json.loads(json.dumps(built[name]))
        shape = ranks[index]["parameters"][3][1]
        shape[0] += 1
        with pytest.raises(AssertionError):
            check_shapes(RECIPES[name], ranks)
    swapped = RECIPES["qwen-r1-7b/paper"]
    with pytest.raises(AssertionError, match="not divisible by TP 3"):
        expected_shapes(replace(swapped, layout=replace(swapped.layout, tp=3)), 0)
    with pytest.raises(AssertionError):
        check_shapes(swapped, built["llama-2-7b/paper"])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_is_refused(built: dict[str, list], name: str) -> None:
    """Builds broken layouts in the same way as the recipes. Catches: a build that would take anything."""
    (found,) = built[name]
    assert found.startswith("StartupError: ") and BROKEN[name][1] in found, found


@every_recipe
def test_memory(built: dict[str, list], name: str) -> None:
    """The bytes of what was built are the planner's, to the byte; the fullest stage leaves a tenth of 80
    GB. Catches: a frozen weight that gets gradients, an optimizer that is not divided over DP, a teacher
    counted where there is none, a layout or batch that Megatron understands in another way."""
    recipe = RECIPES[name]
    setting, layout = recipe.setting, recipe.layout
    for rank in built[name]:
        said = SimpleNamespace(**rank["args"])
        assert said.use_distributed_optimizer and said.accumulate_allreduce_grads_in_fp32
        assert said.data_parallel_size == layout.dp and said.sequence_parallel == layout.sp
        assert rank["microbatches"] == layout.microbatches(setting)
        assert said.recompute_granularity == (None if layout.recompute == "none" else layout.recompute)
        planned = stage_memory(setting, layout, rank["stage"], Assumptions().overhead)
        student, teacher = split(rank)
        sizes = [(prod(shape), element, trained) for shape, element, trained in student.values()]
        trained = sum(count for count, _, trains in sizes if trains)
        assert planned.weights == sum(count * element for count, element, _ in sizes)
        assert planned.teacher == sum(prod(shape) * element for shape, element, _ in teacher.values())
        assert not any(trains for _, _, trains in teacher.values())
        assert planned.gradients == 4 * trained
        assert planned.optimizer == 12 * trained / layout.dp
    assert recipe.plan.memory.total <= ROOM < DEVICES["h100"].memory


def test_a_wrong_number_of_bytes_is_seen(built: dict[str, list]) -> None:
    """Catches: a comparison of memory that cannot fail."""
    for change in ("trained", "bytes"):
        ranks = json.loads(json.dumps(built["qwen3-8b/adapter"]))
        parameter = ranks[0]["parameters"][0]
        parameter[3 if change == "trained" else 2] = True if change == "trained" else 4
        with pytest.raises(AssertionError):
            test_memory({"qwen3-8b/adapter": ranks}, "qwen3-8b/adapter")


@every_recipe
def test_settings(built: dict[str, list], name: str) -> None:
    """Compares the flags, as Megatron understood them, with the paper's settings; those of the adapter are
    for one node. Catches: a setting mistyped, and a checkpoint of CR 4 or 8 that is never saved."""
    recipe, said = RECIPES[name], built[name][0]["args"]
    size = preset(recipe.model.preset)
    assert (said["lr"], said["adam_beta1"], said["adam_beta2"]) == (3e-5, 0.9, 0.95)
    assert (said["clip_grad"], said["weight_decay"], said["bf16"]) == (1.0, 0.0, True)
    assert said["seq_length"] == size.context == recipe.setting.context
    dms, steps = recipe.dms, recipe.flags.train_iters
    if recipe.name == "paper":
        assert said["global_batch_size"] == size.batch
        assert (dms.steps_per_cr, dms.final_cr, dms.kl) == (100, 8, "teacher_student")
        assert dms.window == (512 if recipe.model.folder == "qwen3-8b" else 256)
        assert dms.predictor == "query_channel" and dms.zeroing_steps and steps == max(recipe.steps.values())
    else:
        assert recipe.nodes == 1 and said["global_batch_size"] * size.context == 8 * 32768
        assert (dms.steps_per_cr, dms.final_cr, dms.kl) == (34, 16, "student_teacher")
        assert (dms.window, steps, recipe.steps[8]) == (512, 544, 238)
    for step in recipe.steps.values():
        assert step % recipe.flags.save_interval == 0 and step <= steps
    env = read_env(EXAMPLES / f"{name}.env")
    assert int(env["MIN_FREE_GB"]) * 1e9 >= 2 * recipe.checkpoint_bytes
    assert int(env.get("SIGNAL_SECONDS", "600")) > 3 * recipe.plan.seconds
