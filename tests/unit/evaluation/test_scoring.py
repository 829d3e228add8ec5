"""Budgets, figures from samples, Pareto figures and the report.

These tests need no model and no torch.
"""

import re
from html import unescape

import pytest

from megatron_dms.evaluation.budgets import METHODS, Budget, Run, plan
from megatron_dms.evaluation.report import AXES, draw, mean_gains, report, svg
from megatron_dms.evaluation.samples import Batch, Sample
from megatron_dms.evaluation.scoring import (
    Difference,
    MethodScore,
    cells,
    differences,
    score_problems,
    summarise,
    table,
)
from megatron_dms.evaluation.statistics import Estimate
from megatron_dms.evaluation.tasks import Problem, Task
from megatron_dms.evaluation.tasks.task import grades_of
from tests.support.evaluation_samples import batch, sample

W3 = Budget(3, 8, 4.0)


def task(by_vote: bool = True) -> Task:
    """Return two problems whose answers are "a" and "b"; an empty text has no answer."""
    return Task(
        "letters",
        by_vote,
        [Problem(id, [], gold) for id, gold in (("p0", "a"), ("p1", "b"))],
        lambda problem, texts: grades_of([text or None for text in texts], lambda text: text == problem.gold),
    )


def by_seed() -> dict[int, list[Sample]]:
    both = Batch(0, 2, 3.0, 0.5, decided=30, peak_bytes=100)
    single = [
        Batch(0, 1, 1.0, 0.75, decided=10, peak_bytes=40),
        Batch(1, 1, 2.0, 0.0, decided=20, peak_bytes=60),
    ]
    return {
        0: [sample("p0", ["a", "x", "y"], both), sample("p1", ["", "", ""], both)],
        1: [sample("p0", ["x", "a", "a"], single[0]), sample("p1", ["", "b", "y"], single[1], first=5)],
    }


def score(of: Task, method: str, budget: Budget, samples: dict[int, list[Sample]]) -> MethodScore:
    return summarise(score_problems(of, method, budget, samples), samples)


def test_problems_by_hand() -> None:
    """Catches: figures of another problem or seed, shares of a batch not divided by its problems, answers
    of one seed only."""
    first, second = score_problems(task(), "dms", W3, by_seed())
    assert (first.id, second.id) == ("p0", "p1") and first.as_json()["budget"] == "3-8-4"
    assert first.answers == {0: ["a", "x", "y"], 1: ["x", "a", "a"]}
    assert second.answers == {0: [None] * 3, 1: [None, "b", "y"]}
    assert (first.accuracy, second.accuracy) == (1.0, 0.5)
    assert (first.average, second.average) == pytest.approx((3 / 6, 1 / 6))
    assert (first.passed, second.passed) == pytest.approx((1 - 1 / 20, 1 - 10 / 20))
    assert (first.generated_tokens, second.generated_tokens) == (6, (6 + 18) / 2)
    assert (second.kv_reads, second.dense_kv_reads, second.peak_tokens) == (120, 1200, 12000)
    assert (first.peak_bytes, second.peak_bytes) == ((100 / 2 + 40) / 2, (100 / 2 + 60) / 2)
    assert (first.seconds, second.seconds) == ((3 / 2 + 1) / 2, (3 / 2 + 2) / 2)
    assert first.truncated == first.looping == 2 / 6


def test_scoring_by_hand() -> None:
    """Votes: a tie of three is the first one's (right), nobody answers, 2 of 3, and a tie after an
    abstention. Catches: ties broken otherwise, None that wins, seeds pooled into one vote, pass@W of a seed
    alone, intervals over seeds, batches counted once for each problem, fractions weighted alike."""
    row = score(task(), "dms", W3, by_seed())
    assert row.seeds == 2
    assert row.accuracy == Estimate(0.75, 0.5, 1.0, 2)  # problems: (1 + 1) / 2 and (0 + 1) / 2
    assert row.average.mean == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert (row.average.low, row.average.high) == pytest.approx((1 / 6, 1 / 2))
    assert row.passed.mean == pytest.approx(((1 - 1 / 20) + (1 - 10 / 20)) / 2)  # C(3,3), C(5,3) of C(6,3)
    assert row.achieved_cr == pytest.approx(1 / (1 - (0.5 * 30 + 0.75 * 10) / 60))
    assert (row.seconds, row.peak_bytes) == (6 / 4, 200 / 4)
    total = 3 * (1 + 2 + 3) + (5 + 6 + 7)
    assert row.generated_tokens == total / 4 and row.kv_reads == 10 * total / 4
    assert row.dense_kv_reads == 100 * total / 4 and row.peak_tokens == 1000 * total / 4
    assert row.truncated == row.looping == 4 / 12
    assert score(task(by_vote=False), "dms", W3, by_seed()).accuracy == Estimate(0.75, 0.5, 1.0, 2)
    only = {1: by_seed()[1]}
    assert score(task(), "dms", W3, only).accuracy.mean == 1


def test_code_counts_what_any_chain_solves() -> None:
    """Catches: a vote of texts that cannot be compared."""
    losing = {0: [sample("p0", ["x", "x", "a"], batch(0)), sample("p1", ["y", "y", "y"], batch(1))]}
    assert score(task(), "dms", W3, losing).accuracy.mean == 0
    assert score(task(by_vote=False), "dms", W3, losing).accuracy.mean == 0.5


def test_samples_that_are_not_the_tasks() -> None:
    """Catches: answers graded by another problem's, a mean over what happens to be there."""
    first, second = by_seed()[0]
    with pytest.raises(ValueError, match="dms-3-8-4, seed 0, are of 1 of 2 problems"):
        score(task(), "dms", W3, {0: [first]})
    with pytest.raises(ValueError, match="of other problems"):
        score(task(), "dms", W3, {0: [second, first]})


def test_differences_to_vanilla() -> None:
    """Catches: another budget's vanilla, problems resampled apart, the sign, a CR for its inverse."""
    first, second = sample("p0", ["a"] * 3, batch(0)), sample("p1", ["b"] * 3, batch(1))
    wrong = [sample("p0", ["x"] * 3, batch(0)), sample("p1", ["x"] * 3, batch(1))]
    found = [
        *score_problems(task(), "dms", W3, {0: [first, second]}),
        *score_problems(task(), "dms", Budget(3, 9, 4.0), {0: [first, second]}),
        *score_problems(task(), "vanilla", Budget(3, 8, 1.0), {0: [first, wrong[1]]}),
        *score_problems(task(), "tova", W3, {0: wrong}),
    ]
    dms, tova = differences(found)
    assert (dms.method, dms.budget, tova.method) == ("dms", W3, "tova")
    assert dms.accuracy == Estimate(0.5, 0.0, 1.0, 2) and tova.accuracy == Estimate(-0.5, -1.0, 0.0, 2)
    assert dms.as_json()["budget"] == "3-8-4" and str(tova) == "tova 3-8-4: -50.0 [-100.0, +0.0] points"


def test_everything_evicted_is_no_division_by_zero() -> None:
    whole = batch(fraction=1.0, problems=2)
    row = score(task(), "dms", W3, {0: [sample("p0", "abc", whole), sample("p1", "abc", whole)]})
    assert row.achieved_cr is None and cells(row)["achieved CR"] == "-" and " - " in table([row])


def row(method: str, budget: str, cost: float, accuracy: float) -> MethodScore:
    """Return a row whose costs on the three axes are 1 : 2 : 3, with intervals of 0.1 on either side."""
    known = Estimate(accuracy, accuracy - 0.1, accuracy + 0.1, 7)
    numbers = {"dense_kv_reads": 9.0, "peak_bytes": 9.0, "generated_tokens": 9.0, "truncated": 0.0}
    costs = {"kv_reads": cost, "peak_tokens": 2 * cost, "seconds": 3 * cost, "looping": 0.0}
    return MethodScore(method, Budget.parse(budget), 2, known, known, known, 2.5, **numbers, **costs)


ROWS = [
    row("dms", "4-64-4", 1000, 0.5),
    row("dms", "16-64-8", 4000, 0.7),
    row("vanilla", "1-64-1", 1000, 0.4),
    row("vanilla", "2-64-1", 2000, 0.5),
    row("vanilla", "4-64-1", 4000, 0.45),
    row("tova", "2-64-4", 10, 0.1),
]


def test_mean_gains() -> None:
    """On the logarithm, dms rises by 10 points with each doubling and so does vanilla's front (without the
    beaten point): 10 apart. Catches: beaten points in the front, shares instead of points, gain 0 or an error
    where no cost is shared."""
    gains = mean_gains(ROWS)
    assert list(gains) == ["kv_reads", "peak_tokens", "seconds"] == [axis.name for axis in AXES]
    for by_method in gains.values():
        assert by_method == {"dms": pytest.approx(10.0), "tova": None}
    assert mean_gains([row for row in ROWS if row.method != "vanilla"]) == {}


def test_figures_show_points_fronts_and_labels() -> None:
    """Catches: a beaten point in the line, shares instead of percent, shapes by method, a colour that depends
    on who else is there, figures that differ from call to call."""
    figure = draw(ROWS, AXES[1], "letters")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["vanilla"].get_xdata()) == [2000, 4000]
    assert list(lines["vanilla"].get_ydata()) == pytest.approx([40, 50])
    assert list(lines["dms"].get_xdata()) == [2000, 8000] and list(lines["tova"].get_xdata()) == [20]
    points = [bar.lines[0] for bar in axes.containers]  # in the order of ROWS
    assert [list(point.get_xdata()) for point in points] == [[2 * row.kv_reads] for row in ROWS]
    for point, row in zip(points, ROWS, strict=True):
        assert point.get_marker() == lines[f"CR {row.budget.cr:g}"].get_marker()
        assert point.get_color() == lines[row.method].get_color()
    assert len({line.get_marker() for name, line in lines.items() if name.startswith("CR")}) == 3
    low_high = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert list(low_high) == pytest.approx([40, 60])
    alone = draw(ROWS[2:], AXES[1], "letters").axes[0].get_lines()[0]
    assert alone.get_label() == "vanilla" and alone.get_color() == lines["vanilla"].get_color()
    text = svg(figure)
    assert text == svg(draw(ROWS, AXES[1], "letters"))
    for label in ("4-64", "16-64", "1-64", "2-64", "CR 1", "CR 8", "dms", "tova", "letters", AXES[1].label):
        assert f">{label}</text>" in text, label
    assert text.count(">4-64</text>") == text.count(">2-64</text>") == 2


def test_report() -> None:
    """Catches: a row or setting left out, markup in a setting, anything that is fetched."""
    made_by = {"commit": "c0ffee-dirty"}
    settings = {"task": "letters", "data": "/a<b>/c.jsonl", "temperature": 0.625, "made_by": made_by}
    differences = [Difference("dms", Budget.parse("4-64-8"), Estimate(0.125, -0.25, 0.5, 7))]
    left_out = ["tova-<2>, achieved CR 1"]
    text = report(settings, ROWS, differences, left_out, {"commit": "badc0de"})
    assert "<li>dms 4-64-8: +12.5 [-25.0, +50.0] points</li>" in text
    assert "<li>tova-&lt;2&gt;, achieved CR 1</li>" in text and '"commit": "badc0de"' in unescape(text)
    for part in ("c0ffee-dirty", "0.625", "/a&lt;b&gt;/c.jsonl", "dms, by kv_reads: +10.0 points"):
        assert part in text
    assert "tova, by seconds: no cost is shared" in text and "/a<b>" not in text
    lines = re.findall("<tr>(.*?)</tr>", text)
    assert len(lines) == 1 + len(ROWS)
    for line, expected in zip(lines[1:], ROWS, strict=True):
        assert re.findall("<td>(.*?)</td>", line) == list(cells(expected).values())
    assert "<th>achieved CR</th>" in text
    for name in ("accuracy", "avg@W", "pass@W"):
        assert cells(ROWS[0])[name] == "50.0 [40.0, 60.0]"
    assert table(ROWS[:1]).count("50.0 [40.0, 60.0]") == 3
    assert text.count("<svg") == 3
    assert {url.split("/")[2] for url in re.findall(r"https?://[^\s\"<]*", text)} == {"www.w3.org"}  # xmlns
    assert not re.search(r"<script|<link|<img|\bsrc=|@import|url\((?!#)", text)
    assert "Mean gain" not in (short := report(settings, ROWS[:2], [], [], {}))
    assert "Difference" not in short and "Left out" not in short


def test_budgets() -> None:
    assert str(Budget.parse(" 4-8192-2.50 ")) == "4-8192-2.5"
    assert Run.parse("h2o-4-8192-2.125-seed7") == Run("h2o", Budget(4, 8192, 2.125), 7)
    for text in (
        "",
        "4-8",
        "0-8-4",
        "4-08-4",
        "4-8-0.5",
        "4-8-1e3",
        "4-8-1000",
        "4-8-4.0001",
        "-4-8-4",
        "٤-8-4",
    ):
        with pytest.raises(ValueError, match="is not W-L-CR"):
            Budget.parse(text)


def test_plan() -> None:
    """Catches: vanilla at a CR, a method or budget dropped without a word."""
    one, four = Budget(1, 8, 1.0), Budget(2, 8, 4.0)
    runs = plan(["vanilla", "dms"], [one, four], [0, 1])
    assert [str(run) for run in runs] == [
        *("vanilla-1-8-1-seed0", "vanilla-1-8-1-seed1"),
        *("dms-2-8-4-seed0", "dms-2-8-4-seed1"),
    ]
    assert METHODS[:2] == ("dms", "vanilla")
    for methods, budgets, seeds, message in (
        (["dms", "dms"], [four], [0], "method dms is named twice"),
        (["dms"], [four, Budget.parse("2-8-4.0")], [0], "budget 2-8-4 is named twice"),
        (["dms"], [four], [3, 3], "seed 3 is named twice"),
        (["dsm"], [four], [0], "method 'dsm' is unknown, expected some of dms, vanilla"),
        (["dms", "vanilla"], [four], [0], "method vanilla has nothing to run: no budget of CR 1"),
        (["dms"], [one, four], [0], "budget 1-8-1 has nothing to run: it needs vanilla"),
        (["vanilla"], [one, four], [0], "budget 2-8-4 has nothing to run: it needs a method other than"),
        (["dms"], [four], [], "no seed is named"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan(methods, budgets, seeds)
