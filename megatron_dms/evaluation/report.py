"""The report of an evaluation: one HTML file with figures, table, settings and commit.

The file refers to nothing outside. The Pareto figures follow the paper: the colour says the method, the shape
the CR, a label W-L; a line joins the points of a method's front.
"""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_dms.evaluation.budgets import METHODS
from megatron_dms.evaluation.pareto import Point, mean_gain, pareto_front
from megatron_dms.evaluation.scoring import Difference, MethodScore, cells

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 2px 8px; text-align: right; }
th { border-bottom: 1px solid #888; } svg { max-width: 100%; height: auto; } pre { font-size: 12px;
overflow: auto; }
"""
_EXPLANATION = (
    "Accuracies are in percent, with 95 % bootstrap intervals over problems. The accuracy is the share of "
    "problems that the majority vote of W chains solves; in code tasks, the share that any chain solves. "
    "Costs are means over problems, each with all its chains. Reads and peaks count pairs, averaged over "
    "layers and KV heads. Seconds are wall time on the machine of this run. W-L-CR is the budget that was "
    "asked for; the achieved CR was measured."
)
_MARKERS = "osD^vPX*<>"


class Axis(NamedTuple):
    """A cost that accuracy is drawn against."""

    name: str
    """A field of MethodScore."""
    label: str


AXES = (
    Axis("kv_reads", "KV reads per problem (pairs, mean of layers and KV heads)"),
    Axis("peak_tokens", "peak tokens per problem (pairs, mean of layers and KV heads)"),
    Axis("seconds", "seconds per problem (measured; this machine, this batch size)"),
)


def points(rows: Sequence[MethodScore], axis: Axis) -> dict[str, list[Point]]:
    """Return the points of each method, with accuracies in percent."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        point = Point(getattr(row, axis.name), 100 * row.accuracy.mean, str(row.budget))
        found.setdefault(row.method, []).append(point)
    return found


def mean_gains(rows: Sequence[MethodScore], over: str = "vanilla") -> dict[str, dict[str, float | None]]:
    """Return by how much each method's front lies above the front of `over`, for each axis.

    Returns:
        by axis and method, percentage points: a mean over the costs that both fronts reach (see pareto.py).
        None if the fronts share no cost. Empty if `over` was not run.
    """
    gains: dict[str, dict[str, float | None]] = {}
    for axis in AXES:
        by_method = points(rows, axis)
        if over in by_method:
            gains[axis.name] = {
                method: mean_gain(found, by_method[over])
                for method, found in by_method.items()
                if method != over
            }
    return gains


def draw(rows: Sequence[MethodScore], axis: Axis, title: str) -> Figure:
    """Draw accuracy against one cost, with 95 % intervals."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row.method for row in rows))
    ratios = sorted({row.budget.cr for row in rows})
    for method in methods:
        colour = f"C{METHODS.index(method)}"  # the same in every figure, whatever methods it shows
        front = pareto_front(points(rows, axis)[method])
        axes.plot([p.cost for p in front], [p.accuracy for p in front], color=colour, alpha=0.6, label=method)
        for row in (row for row in rows if row.method == method):
            x, y = getattr(row, axis.name), 100 * row.accuracy.mean
            ends = (y - 100 * row.accuracy.low, 100 * row.accuracy.high - y)
            # Rounding may leave a value below 0, which matplotlib refuses.
            spread = [[max(end, 0.0)] for end in ends]
            marker = _MARKERS[ratios.index(row.budget.cr) % len(_MARKERS)]
            axes.errorbar(x, y, spread, fmt=marker, color=colour, capsize=2, elinewidth=0.8, markersize=5)
            label = f"{row.budget.chains}-{row.budget.length}"
            axes.annotate(label, (x, y), (3, 4), textcoords="offset points", fontsize=6, color=colour)
    for ratio in ratios:
        marker = _MARKERS[ratios.index(ratio) % len(_MARKERS)]
        axes.plot([], [], marker, color="grey", label=f"CR {ratio:g}")
    axes.set_xscale("log")
    axes.set(xlabel=axis.label, ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def svg(figure: Figure) -> str:
    """Return the figure as an element for HTML. Its words stay text, and equal figures give equal text."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_dms"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]


def report(
    settings: Mapping[str, Any],
    rows: Sequence[MethodScore],
    differences: Sequence[Difference],
    left_out: Sequence[str],
    scored_by: Mapping[str, str],
) -> str:
    """Return the whole HTML text; the arguments are what results.py writes into results.json."""
    title = f"{settings['task']}: accuracy at equal cost"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{_EXPLANATION}</p>"]
    parts += [f"<h2>{escape(axis.label)}</h2>{svg(draw(rows, axis, settings['task']))}" for axis in AXES]
    gains = [
        f"<li>{escape(f'{method}, by {axis}: ')}"
        f"{'no cost is shared' if gain is None else f'{gain:+.1f} points'}</li>"
        for axis, by_method in mean_gains(rows).items()
        for method, gain in by_method.items()
    ]
    if gains:
        heading = "Mean gain over vanilla, across the costs that both reach"
        parts.append(f"<h2>{heading}</h2><ul>{''.join(gains)}</ul>")
    for heading, lines in (
        ("Difference in accuracy to vanilla at equal W-L, problem by problem", map(str, differences)),
        ("Left out", left_out),
    ):
        if items := "".join(f"<li>{escape(line)}</li>" for line in lines):
            parts.append(f"<h2>{heading}</h2><ul>{items}</ul>")
    parts.append(f"<h2>All figures</h2>{_table(rows)}")
    shown = {**settings, "scored_by": scored_by}
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(shown, indent=1))}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(rows: Sequence[MethodScore]) -> str:
    shown = [cells(row) for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in shown[0])
    lines = ["".join(f"<td>{escape(text)}</td>" for text in row.values()) for row in shown]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
