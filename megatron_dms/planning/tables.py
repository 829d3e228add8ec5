"""The tables of `megatron-dms plan`, its JSON, and the numbers that a prediction used."""

from collections.abc import Sequence
from dataclasses import asdict, fields

from megatron_dms.planning.calibration import Compared, TrainingError, fitted_slowdown
from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.memory import Memory
from megatron_dms.planning.search import Plan
from megatron_dms.planning.serving import Fit
from megatron_dms.planning.step_time import StepTime
from megatron_dms.text_table import text_table


def numbers_used(device: Device, assumed: Assumptions, memory: float) -> str:
    """Return the numbers that a prediction used. memory: bytes that may be filled."""
    return (
        f"numbers used: {device.name}: {device.flops / 1e12:g} TFLOP/s bf16, {memory / 1e9:g} GB at "
        f"{device.bandwidth / 1e12:g} TB/s, {device.per_node} in a node at {device.node_link / 1e9:g} GB/s, "
        f"network {device.network / 1e9:g} GB/s (each direction)\n"
        f"  reached: matmul {assumed.matmul:g}, attention {assumed.attention:g}, memory {assumed.memory:g}, "
        f"links {assumed.network:g}; {assumed.latency * 1e6:g} us a message; DP messages waited for "
        f"{assumed.exposed_dp:g}; overhead {assumed.overhead / 1e9:g} GB; slowdown {assumed.slowdown:g}"
    )


def plan_rows(plans: Sequence[Plan], steps: dict[float, int], price: float | None = None) -> str:
    """Return the table of the best layouts.

    steps: CR -> training steps until it is reached. price: USD for one device and hour.
    """
    head = ["layout", "GB", "roofline s", "step s"]
    for cr in steps:
        head += [f"h to CR {cr:g}", "device-h"] + ["USD"] * (price is not None)
    lines = [head]
    for plan in plans:
        line = [str(plan.layout), f"{plan.memory.total / 1e9:.1f}", f"{plan.time.roofline:.2f}"]
        line.append(f"{plan.seconds:.2f}")
        for count in steps.values():
            line += [f"{plan.hours(count):.1f}", f"{plan.device_hours(count):.0f}"]
            if price is not None:
                line.append(f"{price * plan.device_hours(count):.0f}")
        lines.append(line)
    return text_table(lines, "<>")


def memory_rows(plans: Sequence[Plan], limit: float) -> str:
    """Return the table of one layout with each kind of recompute: GB by category on the fullest stage."""
    lines = [["GB per rank", *(plan.layout.recompute for plan in plans)]]
    for item in fields(Memory):
        lines.append([item.name, *(f"{getattr(plan.memory, item.name) / 1e9:.2f}" for plan in plans)])
    lines.append(["total", *(f"{plan.memory.total / 1e9:.2f}" for plan in plans)])
    lines.append(["fullest stage, of", *(f"{plan.stage}, {plan.layout.pp}" for plan in plans)])
    lines.append(["fits", *("yes" if plan.memory.total <= limit else "no" for plan in plans)])
    lines.append(["step s", *(f"{plan.seconds:.2f}" for plan in plans)])
    return text_table(lines, "<>")


def time_rows(plan: Plan) -> str:
    """Return the table of the roofline of one step, part by part."""
    head, values = ["roofline s"], [""]
    for item in fields(StepTime):
        head.append(item.name)
        values.append(f"{getattr(plan.time, item.name):.2f}")
    return text_table([head, values], "<>")


def fit_rows(fits: Sequence[Fit]) -> str:
    """Return the table of W-L-CR; L counts the prompt and the generated tokens."""
    lines = [["CR", "W", "L", "limited by", "GB", "ms a step", "GB without DMS"]]
    for fit in fits:
        if not fit.tokens:
            lines.append([f"{fit.cr:g}", str(fit.chains), "none", fit.limit, "-", "-", "-"])
            continue
        lines.append(
            [f"{fit.cr:g}", str(fit.chains), str(fit.tokens), fit.limit, f"{fit.memory / 1e9:.1f}",
             f"{1e3 * fit.step_seconds:.2f}", f"{fit.dense_memory / 1e9:.1f}"]
        )  # fmt: skip
    return text_table(lines, "<>")


def training_rows(found: Sequence[TrainingError], assumed: Assumptions) -> str:
    """Return the table of published device-hours against predictions."""
    lines = [
        [
            "training",
            "published",
            "of peak",
            "roofline",
            "error",
            "predicted",
            "error",
            "others' fit",
            "error",
        ]
    ]
    for row in found:
        cells = [row.run.name, f"{row.run.device_hours:g}", f"{100 * row.utilization:.0f} %"]
        for own in (row.roofline, row.expected, row.left_out):
            cells += [f"{own.predicted:.1f}", f"{own.error:+.0f} %"]
        lines.append(cells)
    notes = [f"  {row.run.name}: {row.run.source}; {row.plan.layout}" for row in found]
    return "\n".join(
        [
            text_table(lines, "<>"),
            "H100-hours; of peak: the share of bf16 FLOPs that the published time means.",
            (
                f"predicted: roofline x slowdown {assumed.slowdown:g}, one for all; others' fit: the "
                "geometric mean of the other runs alone."
            ),
            f"geometric mean of published / roofline: {fitted_slowdown(found):.3f}",
            *notes,
        ]
    )


def compared_rows(found: Sequence[Compared]) -> str:
    """Return the table of measured and predicted figures and their errors."""
    lines = [["measurement", "unit", "measured", "predicted", "error"]]
    for row in found:
        lines.append(
            [row.name, row.unit, f"{row.measured:.5g}", f"{row.predicted:.4g}", f"{row.error:+.1f} %"]
        )
    return text_table(lines, "<>")


def plan_json(plan: Plan, steps: dict[float, int], price: float | None = None) -> dict[str, object]:
    """Return a plan in bytes and seconds, and with a price in USD."""
    cost = {f"{cr:g}": (price or 0) * plan.device_hours(count) for cr, count in steps.items()}
    return {
        "layout": asdict(plan.layout) | {"ranks": plan.layout.ranks},
        "fullest_stage": plan.stage,
        "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
        "roofline_seconds": asdict(plan.time) | {"total": plan.time.roofline},
        "step_seconds": plan.seconds,
        "hours": {f"{cr:g}": plan.hours(count) for cr, count in steps.items()},
        "device_hours": {f"{cr:g}": plan.device_hours(count) for cr, count in steps.items()},
        "usd": None if price is None else cost,
    }


def compared_json(row: Compared) -> dict[str, object]:
    """Return a comparison with its error."""
    return asdict(row) | {"error_percent": row.error}
