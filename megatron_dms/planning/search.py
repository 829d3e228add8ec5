"""The search for the best layout: it tries every layout that can run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dms.ops.schedule import CompressionSchedule
from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.job import RECOMPUTE, Job, RankLayout, layouts
from megatron_dms.planning.memory import Memory, peak_memory
from megatron_dms.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """A layout, the memory of its fullest stage, and the time of a step."""

    layout: RankLayout
    stage: int
    memory: Memory
    time: StepTime
    seconds: float
    """Seconds of a step: the roofline times the slowdown."""

    def hours(self, steps: float) -> float:
        """Return the hours that so many steps take."""
        return steps * self.seconds / 3600

    def device_hours(self, steps: float) -> float:
        """Return the hours that so many steps take, summed over devices."""
        return self.hours(steps) * self.layout.ranks


@dataclass(frozen=True)
class Found:
    """The result of a search.

    plans: the plans that fit, fastest first. tried: the number of layouts. least: the plan that takes the
    least memory, whether or not it fits.
    """

    plans: Sequence[Plan]
    tried: int
    least: Plan


def plan_layout(job: Job, layout: RankLayout, device: Device, assumed: Assumptions) -> Plan:
    """Plan one layout, whether or not it fits."""
    stage, memory = peak_memory(job, layout, assumed.overhead)
    time = step_time(job, layout, device, assumed)
    return Plan(layout, stage, memory, time, time.roofline * assumed.slowdown)


def find_layouts(
    job: Job,
    ranks: int,
    device: Device,
    assumed: Assumptions,
    fixed: dict[str, object] | None = None,
) -> Found:
    """Plan all layouts of so many ranks.

    Args:
        fixed: field of RankLayout -> the value that it must have.

    Raises:
        ValueError: no layout divides model, batch and ranks.
    """
    wanted = (fixed or {}).items()
    plans = [
        plan_layout(job, layout, device, assumed)
        for layout in layouts(job, ranks)
        if all(getattr(layout, name) == value for name, value in wanted)
    ]
    if not plans:
        asked = "".join(f", {name} {value}" for name, value in wanted)
        raise ValueError(
            f"no layout of {ranks} ranks{asked} divides {job.model.name} ({job.model.layers} layers, "
            f"{job.model.heads} query heads, {job.model.groups} KV heads) and a batch of "
            f"{job.batch} x {job.context} tokens; use another number of ranks, or a batch that it "
            "divides"
        )
    fitting = [plan for plan in plans if plan.memory.total <= device.memory]
    # Among equally fast plans the one with the least memory is first, then the first in order of the search.
    fitting.sort(key=lambda plan: (plan.seconds, plan.memory.total))
    return Found(fitting, len(plans), min(plans, key=lambda plan: plan.memory.total))


def with_recompute(job: Job, plan: Plan, device: Device, assumed: Assumptions) -> list[Plan]:
    """Plan the same layout under each kind of recompute."""
    return [plan_layout(job, replace(plan.layout, recompute=name), device, assumed) for name in RECOMPUTE]


def steps_to(cr: float, steps_per_cr: float, zeroing_steps: int) -> int:
    """Return the number of training steps until the schedule asks for `cr`."""
    return zeroing_steps + CompressionSchedule(cr, steps_per_cr).step_of(cr)
