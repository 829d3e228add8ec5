"""The best layout: every one that can run is tried."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dms.ops.schedule import CompressionSchedule
from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.job import RECOMPUTE, Layout, Setting, layouts
from megatron_dms.planning.memory import Memory, peak_memory
from megatron_dms.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """A layout, the memory of its fullest stage, and the time of a step."""

    layout: Layout
    stage: int
    memory: Memory
    time: StepTime
    seconds: float
    """Of a step: the roofline times the slowdown."""

    def hours(self, steps: float) -> float:
        return steps * self.seconds / 3600

    def device_hours(self, steps: float) -> float:
        return self.hours(steps) * self.layout.ranks


@dataclass(frozen=True)
class Found:
    """plans: those that fit, fastest first. tried: how many layouts. least: the one of least memory, fitting
    or not."""

    plans: Sequence[Plan]
    tried: int
    least: Plan


def plan_layout(setting: Setting, layout: Layout, device: Device, assumed: Assumptions) -> Plan:
    """Of one layout, whether or not it fits."""
    stage, memory = peak_memory(setting, layout, assumed.overhead)
    time = step_time(setting, layout, device, assumed)
    return Plan(layout, stage, memory, time, time.roofline * assumed.slowdown)


def find_layouts(
    setting: Setting,
    ranks: int,
    device: Device,
    assumed: Assumptions,
    fixed: dict[str, object] | None = None,
) -> Found:
    """All layouts of so many ranks.

    Args:
        fixed: fields of Layout that must have these values.

    Raises:
        ValueError: no layout divides model, batch and ranks.
    """
    wanted = (fixed or {}).items()
    plans = [
        plan_layout(setting, layout, device, assumed)
        for layout in layouts(setting, ranks)
        if all(getattr(layout, name) == value for name, value in wanted)
    ]
    if not plans:
        asked = "".join(f", {name} {value}" for name, value in wanted)
        raise ValueError(
            f"no layout of {ranks} ranks{asked} divides {setting.model.name} ({setting.model.layers} layers, "
            f"{setting.model.heads} query heads, {setting.model.groups} KV heads) and a batch of "
            f"{setting.batch} x {setting.context} tokens; use another number of ranks, or a batch that it "
            "divides"
        )
    fitting = [plan for plan in plans if plan.memory.total <= device.memory]
    # Of equal speed: the least memory, then the first in the order of the search.
    fitting.sort(key=lambda plan: (plan.seconds, plan.memory.total))
    return Found(fitting, len(plans), min(plans, key=lambda plan: plan.memory.total))


def with_recompute(setting: Setting, plan: Plan, device: Device, assumed: Assumptions) -> list[Plan]:
    """The plan's layout under each setting of recompute."""
    return [plan_layout(setting, replace(plan.layout, recompute=name), device, assumed) for name in RECOMPUTE]


def steps_to(cr: float, steps_per_cr: float, zeroing_steps: int) -> int:
    """Training steps until the schedule asks for `cr`."""
    return zeroing_steps + CompressionSchedule(cr, steps_per_cr).step_of(cr)
