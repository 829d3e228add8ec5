"""Draw the pictures of the claims from their results. Error bars are standard deviations over seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from megatron_dms.evaluation.budgets import METHODS
from megatron_dms.evaluation.pareto import Point, pareto_front

_CRS = ("4", "8")


def draw(claim: str, result: dict[str, Any], path: Path) -> None:
    """Draw the picture of a claim's results into a PNG file."""
    figure_of(claim, result).savefig(path, dpi=110)


def figure_of(claim: str, result: dict[str, Any]) -> Figure:
    """Return the picture of a claim's results."""
    return _DRAWINGS[claim](result)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; the deviation of a single seed is 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def _figure(columns: int, width: float, height: float = 4.2) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, list(panels)


def _figures_of(seeds: Sequence[dict[str, Any]], cr: str, name: str) -> list[float]:
    return [seed["crs"][cr][name] for seed in seeds]


def _point(axes: Any, x: Sequence[float], accuracy: Sequence[float], **style: Any) -> None:
    (x_mean, x_sd), (y_mean, y_sd) = over_seeds(x), over_seeds([100 * value for value in accuracy])
    axes.errorbar(x_mean, y_mean, y_sd, x_sd, capsize=2, elinewidth=0.8, **style)


def _teacher(axes: Any, result: dict[str, Any]) -> None:
    axes.axhline(100 * result["teacher"]["accuracy"], color="grey", ls="--", lw=1, label="teacher")


def _delayed(result: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1, 6.5)
    _teacher(axes, result)
    for index, (name, seeds) in enumerate(result["trials"].items()):
        label = {"dms": "delayed (DMS)", "immediate": "immediate"}[name]
        ladder = list(seeds[0]["crs"])
        xs = [over_seeds(_figures_of(seeds, cr, "achieved_cr"))[0] for cr in ladder]
        ys = [100 * over_seeds(_figures_of(seeds, cr, "accuracy"))[0] for cr in ladder]
        axes.plot(xs, ys, color=f"C{index}", label=label)
        for cr in ladder:
            x, y = _figures_of(seeds, cr, "achieved_cr"), _figures_of(seeds, cr, "accuracy")
            _point(axes, x, y, fmt="o", color=f"C{index}", markersize=4)
    axes.set(xlabel="achieved CR, while the schedule climbs to 8", ylabel="exact answers, %", ylim=(0, 100))
    axes.legend()
    return figure


def _data(result: dict[str, Any]) -> Figure:
    figure, panels = _figure(2, 10)
    for axes, cr in zip(panels, _CRS, strict=True):
        _teacher(axes, result)
        for index, method in enumerate(("DMS", "DMC")):
            names = [name for name in result["trials"] if name.startswith("dmc") == (method == "DMC")]
            rows = [result["trials"][name] for name in names]
            xs = [seeds[0]["crs"][cr]["training_tokens"] for seeds in rows]
            ys = [100 * over_seeds(_figures_of(seeds, cr, "accuracy"))[0] for seeds in rows]
            axes.plot(xs, ys, color=f"C{index}", label=method)
            for x, y, seeds in zip(xs, ys, rows, strict=True):
                accuracy = _figures_of(seeds, cr, "accuracy")
                _point(axes, [x], accuracy, fmt="o", color=f"C{index}", markersize=4)
                achieved = over_seeds(_figures_of(seeds, cr, "achieved_cr"))[0]
                text = f"CR {achieved:.1f}"
                axes.annotate(text, (x, y), (4, 5), textcoords="offset points", fontsize=7, color=f"C{index}")
        axes.set(xscale="log", ylim=(0, 100), xlabel="training tokens", title=f"asked for CR {cr}")
    panels[0].set_ylabel("exact answers, %")
    panels[0].legend()
    return figure


def _long(result: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1, 6.5)
    _teacher(axes, result)
    for index, (name, seeds) in enumerate(result["trials"].items()):
        for cr in seeds[0]["crs"]:
            tokens = _figures_of(seeds, cr, "training_tokens")
            accuracy = _figures_of(seeds, cr, "accuracy")
            _point(axes, tokens, accuracy, fmt="o", color=f"C{index}", markersize=4)
            text = f"CR {over_seeds(_figures_of(seeds, cr, 'achieved_cr'))[0]:.2f}"
            place = (tokens[0], 100 * over_seeds(accuracy)[0])
            axes.annotate(text, place, (4, 5), textcoords="offset points", fontsize=7, color=f"C{index}")
        axes.plot([], [], "o", color=f"C{index}", label=name)
    axes.set(xlabel="training tokens", ylabel="exact answers, %", ylim=(0, 100))
    axes.legend(loc="lower right")
    return figure


def _methods(result: dict[str, Any]) -> Figure:
    figure, panels = _figure(2, 12, 5)
    runs = list(result["seeds"].values())
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            by_key.setdefault((row["method"], row["budget"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in by_key))
    labels = (("kv_reads", "KV reads per problem"), ("peak_tokens", "peak tokens per problem"))
    for axes, (cost, label) in zip(panels, labels, strict=True):
        for (method, budget), rows in by_key.items():
            chains, _, cr = budget.split("-")
            marker, colour = {"1": "o", "4": "s", "8": "D"}[cr], f"C{METHODS.index(method)}"
            accuracy = [row["accuracy"]["mean"] for row in rows]
            _point(axes, [row[cost] for row in rows], accuracy, markersize=5, fmt=marker, color=colour)
            x, y = mean(row[cost] for row in rows), 100 * mean(accuracy)
            axes.annotate(chains, (x, y), (4, 4), textcoords="offset points", fontsize=7)
        for method in methods:
            found = [
                Point(mean(row[cost] for row in rows), 100 * mean(row["accuracy"]["mean"] for row in rows))
                for (of, _), rows in by_key.items()
                if of == method
            ]
            front = pareto_front(found)
            costs, accuracies = [point.cost for point in front], [point.accuracy for point in front]
            axes.plot(costs, accuracies, color=f"C{METHODS.index(method)}", alpha=0.6, label=method)
        for marker, name in (("o", "CR 1"), ("s", "CR 4"), ("D", "CR 8")):
            axes.plot([], [], marker, color="grey", label=name)
        axes.set(xscale="log", xlabel=f"{label} (pairs, mean of layers and KV heads)", ylim=(0, 100))
        axes.xaxis.set_minor_formatter("")  # between two powers of ten their labels overlap
    panels[0].set_ylabel("majority vote of W chains (the numbers), %")
    panels[0].legend(fontsize=8)
    return figure


def _where(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(1, 4))
    for (narrow, wide), cr in zip(grid, _CRS, strict=True):
        found = [seed[cr] for seed in result["seeds"].values()]
        layers, groups = len(found[0]["heads"]), len(found[0]["heads"][0])
        heads = [[mean(f["heads"][i][g] for f in found) for g in range(groups)] for i in range(layers)]
        narrow.imshow(heads, vmin=0, vmax=1, aspect="auto")
        for i in range(layers):
            for g in range(groups):
                shade = "black" if heads[i][g] > 0.6 else "white"
                narrow.text(g, i, f"{heads[i][g]:.2f}", ha="center", va="center", fontsize=8, color=shade)
        narrow.set(xlabel="KV head", ylabel=f"CR {cr}: layer", xticks=range(groups), yticks=range(layers))
        shortest = min(len(f["positions"][0]) for f in found)
        rows = [
            [mean(f["positions"][n][t] for f in found) for t in range(shortest)]
            for n in range(layers * groups)
        ]
        image = wide.imshow(rows, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        wide.axvline(mean(f["prompt"] for f in found), color="white", ls="--", lw=1)
        names = [f"{i}.{g}" for i in range(layers) for g in range(groups)]
        wide.set(xlabel="position in the text (dashed: mean end of the prompts)", ylabel="layer.head")
        wide.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=wide, label="share of pairs kept")
    return figure


def _ablations(result: dict[str, Any]) -> Figure:
    figure, panels = _figure(2, 11, 0.36 * len(result["trials"]) + 1.4)
    names = list(result["trials"])[::-1]
    for axes, cr in zip(panels, _CRS, strict=True):
        axes.axvline(100 * result["teacher"]["accuracy"], color="grey", ls="--", lw=1)
        for place, name in enumerate(names):
            seeds = result["trials"][name]
            x, sd = over_seeds([100 * value for value in _figures_of(seeds, cr, "accuracy")])
            axes.errorbar(x, place, xerr=sd, fmt="o", color="C0", capsize=2)
            achieved = over_seeds(_figures_of(seeds, cr, "achieved_cr"))[0]
            axes.text(99, place, f"CR {achieved:.1f}", fontsize=8, va="center", ha="right")
        axes.set(xlim=(0, 100), xlabel="exact answers, % (dashed: teacher)", title=f"asked for CR {cr}")
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [])
    return figure


_DRAWINGS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "delayed": _delayed,
    "data": _data,
    "methods": _methods,
    "where": _where,
    "ablations": _ablations,
    "long": _long,
}
