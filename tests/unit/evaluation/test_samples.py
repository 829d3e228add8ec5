"""Samples and settings on disk: interruptions, damage, and what may change between calls.

These tests need no model and no torch.
"""

import functools
import json
import operator
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_dms.evaluation.samples import SampleFile, note_maker, runs_there, settle
from tests.support.evaluation_samples import batch, sample


def test_samples_round_trip(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "samples" / "a.jsonl")
    two = [sample("p0", ["\n\r\u2028é", '"', ""], batch(0, 2)), sample("p1", ["\ud83d"], batch(0, 2))]
    file.append(two)
    file.append([sample("p2", ["a"], batch(1))])
    assert SampleFile(file.path).samples == file.samples == [*two, sample("p2", ["a"], batch(1))]


def test_what_an_interruption_leaves(tmp_path: Path) -> None:
    """The file is cut at every byte. Catches: half a batch that counts, a file that `score` cuts while
    `run` writes to it, new lines after half of one."""
    complete = SampleFile(tmp_path / "complete.jsonl")
    batches = [
        [sample("p0", ["a"], batch(0))],
        [sample("p1", ["b"], batch(1, 2)), sample("p2", ["c"], batch(1, 2))],
    ]
    ends = [0]
    for each in batches:
        complete.append(each)
        ends.append(complete.path.stat().st_size)
    text = complete.path.read_bytes()
    for length in range(0, len(text), 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(text[:length])
        file = SampleFile(path)
        done = sum(end <= length for end in ends[1:])
        assert (
            file.samples == functools.reduce(operator.iadd, batches[:done], [])
            and path.read_bytes() == text[:length]
        )
        for each in batches[done:]:
            file.append(each)
        assert path.read_bytes() == text and file.samples == complete.samples


def test_damaged_samples_and_two_writers(tmp_path: Path) -> None:
    """Catches: a broken line skipped, two calls whose batches alternate in one file."""
    path = tmp_path / "a.jsonl"
    first, second = SampleFile(path), SampleFile(path)
    first.append([sample("p0", ["a"], batch(0))])
    with pytest.raises(ValueError, match="does another process write to it"):
        second.append([sample("p0", ["a"], batch(0))])
    assert len(SampleFile(path).samples) == 1
    for line in (b"{}\n", b"[1]\n", b"{\n", b"\n", b'{"id": "p", "chains": 3}\n'):
        path.write_bytes(line + path.read_bytes())
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is no sample"):
            SampleFile(path)
    good = json.dumps(asdict(sample("p0", ["a"], batch(0))))
    for text, broken, message in (
        ('"tokens": 1', '"tokens": "1"', "tokens is '1', expected int"),
        ('"tokens": 1', '"tokens": 1.5', "tokens is '1.5', expected int"),
        ('"kv_reads": 10.0', '"kv_reads": "x"', "kv_reads is 'x', expected float"),
        ('"kv_reads": 10.0', '"kv_reads": NaN', "kv_reads is 'nan', expected float"),
        ('"ended": false', '"ended": 0', "ended is '0', expected bool"),
        ('"text": "a"', '"text": 1', "text is '1', expected str"),
        ('"seconds": 1.0', '"seconds": null', "seconds is 'None', expected float"),
        ('"problems": 1', '"problems": 0', "batch.problems is 0"),
    ):
        assert good.count(text) == 1
        path.write_text(good.replace(text, broken) + "\n")
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 1 is no sample: {message}"):
            SampleFile(path)
    earlier = {**json.loads(good), "prompt_tokens": 5}
    path.write_text(json.dumps(earlier) + "\n")
    assert SampleFile(path).samples == [sample("p0", ["a"], batch(0))]


def test_settings(tmp_path: Path) -> None:
    """Catches: samples of other settings mixed, a foreign folder written to, a first call that failed and
    binds the next ones, paths and grading options that bind, makers that are lost, named twice or that made
    nothing."""
    out = tmp_path / "out"
    settle(out, {"top_p": 3})
    note_maker(out, {"commit": "failed"})
    settle(out, {"top_p": 4})
    assert json.loads((out / "settings.json").read_text()) == {"top_p": 4, "made_by": []}
    note_maker(out, {"commit": "first"})
    SampleFile(out / "samples" / "dms-1-8-4-seed0.jsonl").append([sample("p0", ["a"], batch())])
    settle(out, {"top_p": 4, "dms 4": ["x", "hash"], "data": "a", "task_options": {"workers": 1}})
    for commit in ("second", "first", "second"):
        note_maker(out, {"commit": commit})
    changed = {"dms 4": ["moved", "hash"], "data": "b", "task_options": {"workers": 2}}
    settle(out, {"top_p": 4, "limit": 9} | changed)
    makers = [{"commit": "first"}, {"commit": "second"}]
    kept = {"top_p": 4, "limit": 9, "made_by": makers} | changed
    assert json.loads((out / "settings.json").read_text()) == kept
    with pytest.raises(ValueError, match="with top_p 4, now it is 5: choose another --out"):
        settle(out, {"top_p": 5})
    with pytest.raises(ValueError, match=r"with dms 4 \['moved', 'hash'\], now it is"):
        settle(out, {"dms 4": ["moved", "other"]})
    assert json.loads((out / "settings.json").read_text()) == kept
    for text in ("[]", "{"):
        (out / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json (is not JSON|holds a list)"):
            settle(out, {"top_p": 4})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine").touch()
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        settle(foreign, {})
    assert [path.name for path in foreign.iterdir()] == ["mine"]


def test_runs_are_sorted_by_method_and_number(tmp_path: Path) -> None:
    """Catches: names sorted as text, 16 before 2; methods by the alphabet."""
    names = ["dms-2-8-4-seed0", "dms-2-8-4-seed10", "dms-16-8-4-seed2", "vanilla-4-8-1-seed0"]
    names += ["tova-2-8-4-seed0", "tova-2-8-16-seed0", "h2o-2-8-2.5-seed0"]
    (tmp_path / "samples").mkdir()
    for name in reversed(names):
        (tmp_path / "samples" / f"{name}.jsonl").touch()
    assert [str(run) for run in runs_there(tmp_path)] == names
    (tmp_path / "samples" / "dms-2-8-4-seed00.jsonl").touch()
    with pytest.raises(ValueError, match="'dms-2-8-4-seed00' is no METHOD-W-L-CR-seedN"):
        runs_there(tmp_path)
