"""Predictions against measurements, one set of constants for all; nothing is tuned by row.

The step-time model has one fitted number, Assumptions.slowdown; `fitted_slowdown` is where it comes from. How
far off the next run may be is better seen where a run has no part in the fit: `trainings` gives that too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_dms.planning import published
from megatron_dms.planning.devices import DEVICES, Assumptions, Device
from megatron_dms.planning.job import RECIPES, Setting
from megatron_dms.planning.models import ModelSize, preset
from megatron_dms.planning.published import Training
from megatron_dms.planning.search import Plan, find_layouts
from megatron_dms.planning.serving import Serving, live_pairs
from megatron_dms.planning.step_time import step_flops


@dataclass(frozen=True)
class Compared:
    """One figure. unit: of both."""

    name: str
    unit: str
    measured: float
    predicted: float
    note: str = ""

    @property
    def error(self) -> float:
        """In percent of what was measured; negative: the prediction is too low."""
        return 100 * (self.predicted / self.measured - 1)


@dataclass(frozen=True)
class TrainingError:
    """A published run, with the roofline alone, with the one slowdown, and with that of the other runs."""

    run: Training
    plan: Plan
    utilization: float
    """Share of the devices' bf16 FLOPs that the published time means, with the plan's layout."""
    roofline: Compared
    expected: Compared
    left_out: Compared


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def setting_of(run: Training) -> Setting:
    return Setting(preset(run.model), RECIPES[run.recipe], run.context, run.batch)


def trainings(assumed: Assumptions) -> list[TrainingError]:
    """All published runs, each with the fastest layout that pretrain_dms.py would take."""
    bare, device = replace(assumed, slowdown=1.0), DEVICES["h100"]
    plans = {
        run: find_layouts(setting_of(run), run.ranks, device, bare).plans[0] for run in published.TRAININGS
    }
    hours = {run: plan.device_hours(run.steps) for run, plan in plans.items()}
    found = []
    for run, plan in plans.items():
        others = geometric_mean(other.device_hours / hours[other] for other in plans if other is not run)
        rows = (
            Compared(run.name, "H100-hours", run.device_hours, hours[run] * factor, run.source)
            for factor in (1.0, assumed.slowdown, others)
        )
        flops = run.steps * step_flops(setting_of(run), plan.layout)
        utilization = flops / (3600 * run.device_hours * device.flops)
        found.append(TrainingError(run, plan, utilization, *rows))
    return found


def fitted_slowdown(found: Sequence[TrainingError]) -> float:
    """Geometric mean of measured over roofline time."""
    return geometric_mean(row.roofline.measured / row.roofline.predicted for row in found)


def _fp32(model: ModelSize, device: Device, window: int) -> Serving:
    assumed = Assumptions(memory=1.0, matmul=1.0, overhead=0.0)
    return Serving(model, device, assumed, window=window, element=4)


_SHAPES = {"Llama 3.2 1B": preset("llama-3.2-1b"), "Qwen3 0.6B": published.QWEN3_SMALL}


def _processor() -> Device:
    """The two CPU cores of docs/performance.md. Their bandwidth is what the first dense row there gives,
    which therefore has no error; their arithmetic is left out."""
    first = published.DECODES[0]
    unit = Device("2 CPU cores", math.inf, math.inf, 1.0, 1.0, 1.0)
    serving = _fp32(_SHAPES[first.shape], unit, published.DECODE_WINDOW)
    return replace(unit, bandwidth=serving.seconds_of(first.batch, first.context) / (first.dense_ms / 1e3))


def decoding() -> tuple[float, list[Compared], list[Compared]]:
    """(bytes/s of the processor, cache bytes over dense ones, ms of a decode step)."""
    device, caches, steps = _processor(), [], []
    for row in published.DECODES:
        serving = _fp32(_SHAPES[row.shape], device, published.DECODE_WINDOW)
        pairs = max(published.DECODE_WINDOW + 1, row.context / row.cr)  # forced, unlike live_pairs
        # both have grown to their size before: no tensor exists twice
        growth = 1 + 1 / (2 * serving.model.layers)
        cache = serving.allocated_bytes(pairs, True) / growth / serving.pair_bytes(row.context)
        name = f"{row.shape}, {row.batch} x {row.context}, CR {row.cr:g}"
        caches.append(Compared(name, "cache / dense", row.cache, cache))
        for kind, ms, held in (("dense", row.dense_ms, row.context), ("DMS", row.dms_ms, pairs)):
            steps.append(Compared(f"{name}, {kind}", "ms", ms, 1e3 * serving.seconds_of(row.batch, held)))
    return device.bandwidth, caches, steps


def largest_batches() -> list[Compared]:
    """Of the toy in 1 GB."""
    serving = _fp32(published.TOY, _processor(), published.DECODE_WINDOW)
    found = []
    for context, batches in published.SERVED.items():
        for cr, batch in zip(published.SERVED_CRS, batches, strict=True):
            pairs = context if cr == 1 else max(published.DECODE_WINDOW + 1, context / cr)
            room = published.SERVED_MEMORY - serving.weight_bytes
            name = f"toy, context {context}, {'dense' if cr == 1 else f'CR {cr:g}'}"
            predicted = room // serving.allocated_bytes(pairs, cr > 1)
            found.append(Compared(name, "sequences", batch, predicted))
    return found


def demo() -> list[Compared]:
    """Pairs held and read by the demo's models, from the texts' length and the achieved CR. How long the
    prompts are follows from the teacher's reads."""
    teacher, *students = published.DEMO
    end = teacher.peak_tokens
    start = math.sqrt(end**2 - 2 * teacher.kv_reads)  # the teacher's queries read start ... end pairs
    found = []
    for row in students:
        peak = live_pairs(end, row.achieved_cr, published.DEMO_WINDOW)
        mean = live_pairs(
            (start + end) / 2, row.achieved_cr, published.DEMO_WINDOW
        )  # linear beyond the window
        found.append(Compared(f"demo, {row.name}", "peak pairs", row.peak_tokens, peak))
        found.append(Compared(f"demo, {row.name}", "pairs read", row.kv_reads, (end - start) * mean))
    return found
