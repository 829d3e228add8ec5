"""Predictions against measurements. One set of constants serves all of them; nothing is tuned row by row.

Measurements are the authors', NVIDIA's, and those of this repository; tests/unit/planning/test_calibration.py
compares the latter with docs/first_run.md and docs/performance.md.

The step-time model has one fitted number, Assumptions.slowdown, which `fitted_slowdown` computes. How far off
the next run may be shows better if a run has no part in the fit: `trainings` gives this error, too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_dms.planning.devices import DEVICES, Assumptions, Device
from megatron_dms.planning.job import RECIPES, Job
from megatron_dms.planning.models import QWEN3_SMALL, TOY, ModelSize, preset
from megatron_dms.planning.search import Plan, find_layouts
from megatron_dms.planning.serving import Serving, live_pairs
from megatron_dms.planning.step_time import step_flops


class Training(NamedTuple):
    """A retrofit whose device-hours are known.

    ranks: the best layout of this many ranks is predicted. Only the device-hours of the paper's runs are
    known, so their number of ranks is assumed.
    """

    name: str
    model: str
    recipe: str
    context: int
    batch: int
    steps: int
    ranks: int
    device_hours: float
    source: str


TRAININGS = (
    Training(
        "Llama 3.2 1B, per unit of CR",
        "llama-3.2-1b",
        "paper",
        4096,
        1024,
        100,
        64,
        10.0,
        "paper; 64 assumed",
    ),
    Training(
        "Qwen-R1 32B, per unit of CR", "qwen-r1-32b", "paper", 8192, 1024, 100, 64, 345.0, "paper; 64 assumed"
    ),
    Training(
        "Qwen3-8B adapter, CR 16", "qwen3-8b", "adapter", 32768, 8, 544, 8, 32.0, "NVIDIA: about 4 h on 8"
    ),
)
"""All runs were on H100. The paper's schedule takes 100 steps for each unit of CR."""


class Decode(NamedTuple):
    """A row of docs/performance.md, "Decoding": fp32 on two CPU cores, pairs forced to 1 / CR.

    dense_ms, dms_ms: time of a step. cache: allocated bytes divided by those of the dense cache.
    """

    shape: str
    batch: int
    cr: float
    context: int
    dense_ms: float
    dms_ms: float
    cache: float


DECODES = tuple(
    Decode(*row)
    for row in (
        ("Llama 3.2 1B", 1, 8, 4096, 251, 224, 0.131),
        ("Llama 3.2 1B", 1, 8, 16384, 483, 241, 0.127),
        ("Llama 3.2 1B", 1, 8, 32768, 810, 250, 0.126),
        ("Llama 3.2 1B", 1, 8, 65536, 2224, 593, 0.126),
        ("Llama 3.2 1B", 4, 8, 4096, 671, 476, 0.133),
        ("Llama 3.2 1B", 4, 8, 8192, 936, 498, 0.129),
        ("Llama 3.2 1B", 1, 1, 4096, 238, 227, 1.000),
        ("Llama 3.2 1B", 1, 1, 16384, 421, 250, 1.000),
        ("Llama 3.2 1B", 4, 1, 4096, 713, 531, 1.000),
        ("Qwen3 0.6B", 1, 8, 4096, 193, 104, 0.133),
        ("Qwen3 0.6B", 1, 8, 16384, 898, 136, 0.127),
        ("Qwen3 0.6B", 1, 8, 32768, 1607, 140, 0.126),
        ("Qwen3 0.6B", 4, 8, 4096, 901, 255, 0.133),
        ("Qwen3 0.6B", 1, 1, 4096, 200, 153, 1.000),
        ("Qwen3 0.6B", 1, 1, 16384, 968, 314, 1.000),
    )
)
DECODE_WINDOW = 256

SERVED = {1024: (1519, 5069, 5069), 2048: (761, 2915, 5069), 4096: (381, 1515, 3075), 8192: (190, 799, 1554)}
"""docs/performance.md, "Serving", the toy in fp32: context -> largest batch of a dense cache, CR 4, CR 8."""
SERVED_MEMORY = 1e9
SERVED_CRS = (1.0, 4.0, 8.0)


class Demo(NamedTuple):
    """A row of the demo's table in docs/first_run.md. Pairs are means over layers and KV heads."""

    name: str
    achieved_cr: float
    kv_reads: float
    peak_tokens: float


DEMO = (Demo("teacher", 1.0, 26727, 250.8), Demo("cr4", 4.10, 9077, 74.4), Demo("cr8", 7.18, 6183, 49.7))
DEMO_WINDOW = 16

NOT_COMPARED = {
    "training steps of docs/performance.md": "toys on two CPU cores: calls, not arithmetic, take the time",
    "attention, distillation losses, conversion": "parts, on CPU cores, of which there is no model here",
    "up to 5 x throughput of Qwen3-8B (paper)": "its batches, lengths and device memory are not known here",
    "serve: steps and tokens/s of docs/performance.md": "the toy's step is calls: 0.6 to 1.9 ms",
}


@dataclass(frozen=True)
class Compared:
    """A measured figure and its prediction, both in `unit`."""

    name: str
    unit: str
    measured: float
    predicted: float
    note: str = ""

    @property
    def error(self) -> float:
        """Error in percent of the measured figure; negative: the prediction is too low."""
        return 100 * (self.predicted / self.measured - 1)


@dataclass(frozen=True)
class TrainingError:
    """A published run against three predictions.

    roofline: without a slowdown. expected: with the slowdown fitted to all runs. left_out: with the slowdown
    fitted to the other runs.
    """

    run: Training
    plan: Plan
    utilization: float
    """Share of the devices' bf16 FLOPs that the published time stands for, at the plan's layout."""
    roofline: Compared
    expected: Compared
    left_out: Compared


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def job_of(run: Training) -> Job:
    """Return the job of a published run."""
    return Job(preset(run.model), RECIPES[run.recipe], run.context, run.batch)


def trainings(assumed: Assumptions) -> list[TrainingError]:
    """Predict all published runs, each at the fastest layout that pretrain_dms.py would take."""
    bare, device = replace(assumed, slowdown=1.0), DEVICES["h100"]
    plans = {run: find_layouts(job_of(run), run.ranks, device, bare).plans[0] for run in TRAININGS}
    hours = {run: plan.device_hours(run.steps) for run, plan in plans.items()}
    found = []
    for run, plan in plans.items():
        others = geometric_mean(other.device_hours / hours[other] for other in plans if other is not run)
        rows = (
            Compared(run.name, "H100-hours", run.device_hours, hours[run] * factor, run.source)
            for factor in (1.0, assumed.slowdown, others)
        )
        flops = run.steps * step_flops(job_of(run), plan.layout)
        utilization = flops / (3600 * run.device_hours * device.flops)
        found.append(TrainingError(run, plan, utilization, *rows))
    return found


def fitted_slowdown(found: Sequence[TrainingError]) -> float:
    """Return the geometric mean of measured time divided by roofline time."""
    return geometric_mean(row.roofline.measured / row.roofline.predicted for row in found)


def _fp32(model: ModelSize, device: Device, window: int) -> Serving:
    assumed = Assumptions(memory=1.0, matmul=1.0, overhead=0.0)
    return Serving(model, device, assumed, window=window, element=4)


_SHAPES = {"Llama 3.2 1B": preset("llama-3.2-1b"), "Qwen3 0.6B": QWEN3_SMALL}


def _processor() -> Device:
    """Return the two CPU cores of docs/performance.md as a device.

    Their bandwidth follows from the first dense row there, which therefore has no error; the time of their
    arithmetic is left out.
    """
    first = DECODES[0]
    unit = Device("2 CPU cores", math.inf, math.inf, 1.0, 1.0, 1.0)
    serving = _fp32(_SHAPES[first.shape], unit, DECODE_WINDOW)
    return replace(unit, bandwidth=serving.seconds_of(first.batch, first.context) / (first.dense_ms / 1e3))


def decoding() -> tuple[float, list[Compared], list[Compared]]:
    """Return the processor's bytes/s, and two comparisons: cache bytes over dense ones, ms of a step."""
    device, caches, steps = _processor(), [], []
    for row in DECODES:
        serving = _fp32(_SHAPES[row.shape], device, DECODE_WINDOW)
        pairs = max(DECODE_WINDOW + 1, row.context / row.cr)  # the ratio is forced, unlike live_pairs
        # both caches have already grown to their size, so no tensor exists twice
        growth = 1 + 1 / (2 * serving.model.layers)
        cache = serving.allocated_bytes(pairs, True) / growth / serving.pair_bytes(row.context)
        name = f"{row.shape}, {row.batch} x {row.context}, CR {row.cr:g}"
        caches.append(Compared(name, "cache / dense", row.cache, cache))
        for kind, ms, held in (("dense", row.dense_ms, row.context), ("DMS", row.dms_ms, pairs)):
            steps.append(Compared(f"{name}, {kind}", "ms", ms, 1e3 * serving.seconds_of(row.batch, held)))
    return device.bandwidth, caches, steps


def largest_batches() -> list[Compared]:
    """Compare the largest batches of the toy in 1 GB."""
    serving = _fp32(TOY, _processor(), DECODE_WINDOW)
    found = []
    for context, batches in SERVED.items():
        for cr, batch in zip(SERVED_CRS, batches, strict=True):
            pairs = context if cr == 1 else max(DECODE_WINDOW + 1, context / cr)
            room = SERVED_MEMORY - serving.weight_bytes
            name = f"toy, context {context}, {'dense' if cr == 1 else f'CR {cr:g}'}"
            predicted = room // serving.allocated_bytes(pairs, cr > 1)
            found.append(Compared(name, "sequences", batch, predicted))
    return found


def demo() -> list[Compared]:
    """Compare the pairs that the demo's models hold and read, from the length of texts and the achieved CR.

    The length of the prompts follows from the teacher's reads.
    """
    teacher, *students = DEMO
    end = teacher.peak_tokens
    start = math.sqrt(end**2 - 2 * teacher.kv_reads)  # the teacher's queries read start ... end pairs
    found = []
    for row in students:
        peak = live_pairs(end, row.achieved_cr, DEMO_WINDOW)
        mean = live_pairs((start + end) / 2, row.achieved_cr, DEMO_WINDOW)  # linear beyond the window
        found.append(Compared(f"demo, {row.name}", "peak pairs", row.peak_tokens, peak))
        found.append(Compared(f"demo, {row.name}", "pairs read", row.kv_reads, (end - start) * mean))
    return found
