"""Planning: every layout is tried, and the best one found; the command line, its JSON and its errors."""

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.job import RECIPES, RECOMPUTE, Job, RankLayout, divisors, layouts, refusal
from megatron_dms.planning.memory import stage_memory
from megatron_dms.planning.models import ModelSize, preset
from megatron_dms.planning.search import find_layouts, with_recompute
from megatron_dms.planning.step_time import step_time
from tests.support.tools import ROOT, run_python, run_tool

SMALL = ModelSize("small", 6, 32, 64, 8, 4, 4, 100, 64)
DEVICE, ASSUMED = DEVICES["h100"], replace(Assumptions(), overhead=0.0)


def by_brute_force(job: Job, ranks: int) -> list[RankLayout]:
    """Return all layouts of numbers from 1 to `ranks` that satisfy the conditions written out here."""
    model, found = job.model, []
    sizes = range(1, ranks + 1)
    for tp, pp, cp, dp in product(sizes, repeat=4):
        if tp * pp * cp * dp != ranks:
            continue
        if model.heads % tp or model.groups % tp or model.ffn % tp or model.layers % pp:
            continue
        if cp > 1 and job.context % (2 * cp):
            continue
        # the query heads that read one KV head, and how many of them a rank has: one divides the other
        if model.heads % (tp * cp) or (model.groups % (tp * cp) and (tp * cp) % model.groups):
            continue
        for micro, sp, recompute in product(range(1, job.batch + 1), (False, True), RECOMPUTE):
            if job.batch % (dp * micro) or (sp and tp == 1):
                continue
            if not sp or job.context % (tp * cp) == 0:
                found.append(RankLayout(tp, pp, cp, dp, sp, micro, recompute))
    return found


@pytest.mark.parametrize(("context", "batch"), [(64, 12), (18, 8)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_search_is_exhaustive(recipe: str, context: int, batch: int) -> None:
    """Catches: a divisor left out, a layout that cannot run, one tried twice, a best that is not."""
    job = Job(SMALL, RECIPES[recipe], context, batch)
    for ranks in (1, 4, 6, 12):
        expected = by_brute_force(job, ranks)
        found = list(layouts(job, ranks))
        assert len(found) == len(set(found)) and set(found) == set(expected)

        def bytes_of(layout: RankLayout) -> float:
            return max(stage_memory(job, layout, stage, 0.0).total for stage in range(layout.pp))

        least = min(map(bytes_of, expected))
        for memory in (2 * least, 1e18):
            device = replace(DEVICE, memory=memory)
            plans = find_layouts(job, ranks, device, ASSUMED).plans
            fitting = [layout for layout in expected if bytes_of(layout) <= memory]
            times = [step_time(job, layout, device, ASSUMED).roofline for layout in fitting]
            assert {plan.layout for plan in plans} == set(fitting)
            assert plans[0].time.roofline == min(times)
            assert plans[0].memory.total == bytes_of(plans[0].layout)
            assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
        found = find_layouts(job, ranks, replace(DEVICE, memory=1.0), ASSUMED)
        assert not found.plans and found.tried == len(expected) and found.least.memory.total == least


def test_parts_of_a_layout_can_be_given() -> None:
    job = Job(preset("llama-3.1-8b"), RECIPES["paper"], 8192, 64)
    found = find_layouts(job, 16, DEVICE, ASSUMED, fixed={"tp": 2, "recompute": "full", "sp": False})
    assert found.plans and all(
        (plan.layout.tp, plan.layout.recompute, plan.layout.sp) == (2, "full", False) for plan in found.plans
    )
    each = with_recompute(job, found.plans[0], DEVICE, ASSUMED)
    assert [plan.layout.recompute for plan in each] == list(RECOMPUTE)
    assert each[2].memory == found.plans[0].memory
    with pytest.raises(ValueError, match=r"no layout of 16 ranks, tp 3 divides llama-3.1-8b"):
        find_layouts(job, 16, DEVICE, ASSUMED, fixed={"tp": 3})


def test_refusals() -> None:
    """Each refusal names its numbers. Catches: a layout that Megatron would refuse."""
    job = Job(SMALL, RECIPES["paper"], 18, 12)
    for layout, message in [
        (RankLayout(tp=3), "8 query heads are not divisible by 3"),
        (RankLayout(tp=8), "4 KV heads are not divisible by 8"),
        (RankLayout(pp=4), "6 layers are not divisible by 4"),
        (RankLayout(dp=2, micro=4), "12 samples of the batch are not divisible by 8"),
        (RankLayout(cp=2), "18 tokens of context are not divisible by 4"),
        (RankLayout(cp=3), "8 query and 4 KV heads of a TP rank cannot be shared out among CP 3"),
        (RankLayout(sp=True), "sequence parallelism needs TP above 1"),
        (RankLayout(tp=4, sp=True, micro=2), "18 tokens of context on each rank are not divisible by TP 4"),
    ]:
        assert refusal(job, layout) == message
    assert refusal(job, RankLayout(tp=2, pp=3, dp=2, sp=True, micro=3)) is None
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and divisors(1) == [1]


def answer(*words: str) -> tuple[str, dict]:
    """Run the planner; return stdout, and its last line parsed."""
    done = run_tool("plan", *words)
    assert done.status == 0, done.error
    return done.out, json.loads(done.out.splitlines()[-1])


def test_a_thousand_ranks_within_a_minute() -> None:
    begin = time.monotonic()
    text, found = answer("train", "--model", "qwen-r1-32b", "--ranks", "1024")
    assert time.monotonic() - begin < 60
    assert found["tried"] > 2000 and found["best"][0]["layout"]["ranks"] == 1024
    for used in ("989 TFLOP/s", "3.35 TB/s", "450 GB/s", "network 50 GB/s", "matmul 0.6", "slowdown"):
        assert used in text
    assert found["device"] == vars(DEVICES["h100"]) and found["assumptions"] == vars(Assumptions())


def test_options_reach_the_plan() -> None:
    """Catches: an option that is accepted and ignored."""
    base = ("train", "--model", "llama-3.1-8b", "--ranks", "16", "--show", "1")
    _, before = answer(*base)
    kept = {"seconds": before["best"][0]["step_seconds"], "hours": before["best"][0]["hours"]}
    assert before["context"] == 8192 and before["batch"] == 1024
    assert before["steps"] == {"4": 300, "8": 700}
    assert kept["hours"]["8"] == pytest.approx(700 * kept["seconds"] / 3600)
    assert before["best"][0]["device_hours"]["8"] == pytest.approx(16 * kept["hours"]["8"])
    for words, changed in [
        (["--context", "4096"], lambda found: found["context"] == 4096),
        (["--batch", "256"], lambda found: found["batch"] == 256),
        (["--recipe", "adapter"], lambda found: found["best"][0]["memory_bytes"]["teacher"] == 0),
        (["--fuse-output-layer"], lambda found: found["fuse_output_layer"]),
        (["--no-distributed-optimizer"], lambda found: not found["distributed_optimizer"]),
        (["--logits", "fp32"], lambda found: found["logits_bytes"] == 4),
        (["--cr", "2", "--steps-per-cr", "50"], lambda found: found["steps"] == {"2": 50}),
        (["--zeroing-steps", "7"], lambda found: found["steps"] == {"4": 307, "8": 707}),
        (["--memory", "60"], lambda found: found["best"][0]["memory_bytes"]["total"] <= 60e9),
        (["--device", "h200"], lambda found: found["device"]["memory"] == 141e9),
        (["--overhead-gb", "9"], lambda found: found["best"][0]["memory_bytes"]["overhead"] == 9e9),
        (["--latency", "0"], lambda found: found["assumptions"]["latency"] == 0),
        (["--tp", "8", "--pp", "2", "--dp", "1"], lambda found: found["best"][0]["layout"]["tp"] == 8),
        (["--micro-batch", "2"], lambda found: found["best"][0]["layout"]["micro"] == 2),
        (["--recompute", "full"], lambda found: found["best"][0]["layout"]["recompute"] == "full"),
        (["--tp", "4", "--no-sp"], lambda found: not found["best"][0]["layout"]["sp"]),
        (["--show", "3"], lambda found: len(found["best"]) == 3),
    ]:  # fmt: skip
        _, found = answer(*base, *words)
        assert changed(found) and found != before, words


def test_serve() -> None:
    """Catches: a row that breaks its budget, an order other than asked for."""
    text, found = answer(
        *("serve", "--model", "qwen3-8b", "--memory", "40", "--milliseconds", "12", "--tp", "2"),
        *("--chains", "1", "64", "--cr", "1", "8", "--window", "512", "--fixed-milliseconds", "1"),
    )
    assert [(fit["cr"], fit["chains"]) for fit in found["fits"]] == [(1, 1), (1, 64), (8, 1), (8, 64)]
    for fit in found["fits"]:
        assert 0 < fit["memory"] <= 40e9 and fit["step_seconds"] <= 12e-3 and str(fit["tokens"]) in text
    assert found["fits"][3]["tokens"] > 4 * found["fits"][1]["tokens"]
    assert found["window"] == 512 and found["fixed_seconds"] == 1e-3
    text, found = answer("serve", "--model", "qwen3-8b", "--memory", "10", "--milliseconds", "12")
    assert all(fit["tokens"] == 0 for fit in found["fits"]) and "none" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("train", "one of the arguments --model --hf is required"),
        ("train --model qwen3-8b --hf .", "not allowed with argument --model"),
        ("train --model qwen4", "model is 'qwen4', expected one of llama-3.2-1b"),
        ("train --hf nowhere", "nowhere/config.json cannot be read"),
        ("train --model qwen3-8b --rank 8", "unrecognized arguments: --rank 8"),
        ("train --model qwen3-8b --ranks 0", "0 is no whole number above 0"),
        ("train --model qwen3-8b --ranks 1.5", "1.5 is no whole number above 0"),
        ("train --model qwen3-8b --ranks 7", "no layout of 7 ranks divides qwen3-8b (36 layers"),
        ("train --model qwen3-8b --context 65536", "--context is 65536, expected 1 to 40960"),
        ("train --model qwen3-8b --ranks 1", "none of"),
        ("train --model qwen3-8b --device b200", "--device is 'b200', expected one of h100"),
        ("train --model qwen3-8b --cp 3 --ranks 3", "no layout of 3 ranks, cp 3 divides qwen3-8b"),
        ("train --model qwen3-8b --cr 0.5", "0.5 is below 1"),
        ("train --model qwen3-8b --zeroing-steps -1", "-1"),
        ("train --model qwen3-8b --matmul-efficiency 1.5", "1.5 is above 1"),
        ("train --model qwen3-8b --slowdown nan", "nan is no number above 0"),
        ("train --model qwen3-8b --memory 0", "0 is no number above 0"),
        ("serve --model qwen3-8b", "the following arguments are required: --milliseconds"),
        ("serve --model qwen3-8b --milliseconds 5 --tp 16", "--tp is 16, expected a divisor of 32 query"),
        ("check --model qwen3-8b", "unrecognized arguments: --model qwen3-8b"),
    ],
)
def test_bad_input(words: str, message: str) -> None:
    """Bad input gives one line of error, exit status 2, and nothing on stdout."""
    done = run_tool("plan", *words.split())
    errors = [line for line in done.errors if line.startswith("error: ")]
    assert done.status == 2 and not done.out and len(errors) == 1 and message in errors[0]
    assert done.errors[-1] == errors[0] and "Traceback" not in done.error


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['plan.py', 'check']\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / 'plan.py')!r}, run_name='__main__')\n"
        "finally: assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    done = run_python("-c", code)
    assert done.status == 0, done.error


def test_a_folder(tmp_path: Path) -> None:
    """Catches: a config.json whose context or batch is made up."""
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1000000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("train", "--hf", str(tmp_path), "--context", "4096")
    done = run_tool("plan", *words)
    assert done.status == 2 and f"{tmp_path.name} is no preset: give --batch N" in done.error
    _, found = answer(*words, "--batch", "64")
    assert found["model"]["parameters"] == 596_049_920 and found["model"]["qk_norm"]
