"""Odd values in the files that an import keeps and in a Megatron checkpoint, as test_odd_values.py does
for HF."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_dms.conversion import export_hf
from megatron_dms.conversion.hf_folder import INDEX
from megatron_dms.formats.megatron_folder import SOURCE, TRACKER, checkpoint_args
from megatron_dms.formats.torch_dist import COMMON_STATE, Reader
from tests.support.checkpoint_edits import DMS, edit_metadata, files_of, rewrite, store_again
from tests.support.odd_values import (
    VALUES,
    damaged,
    leaves_nothing,
    must,
    outcome,
    short,
)


def test_the_layout_kept_by_an_import(copies: Path, tmp_path: Path) -> None:
    """Damages megatron_dms_source.json. Catches: getattr(torch, ...) of any name, a file written outside
    of the output or over config.json, a tensor exported that no model has, KeyError for what is not there."""
    layout = json.loads((copies / "megatron" / "hf" / SOURCE).read_text())
    name, (file, dtype) = next(iter(layout["tensors"].items()))
    odd: dict[str, object] = {f"all {short(value)}": value for value in VALUES}
    for value in VALUES:
        if value != {}:  # which is a layout of nothing, as where none is known
            odd[f"tensors {short(value)}"] = {**layout, "tensors": value}
        odd[f"entry {short(value)}"] = {**layout, "tensors": {**layout["tensors"], name: value}}
        if value != {}:
            odd[f"copies {short(value)}"] = {**layout, "copies": value}
        odd[f"copy of {short(value)}"] = {**layout, "copies": {"lm_head.weight": value}}
    for key in ("tensors", "copies"):
        odd[f"no {key}"] = {left: value for left, value in layout.items() if left != key}
    types = ("int8x", "int8", "nn", "float", "float64", "float8_e4m3fn", "torch.float32", "__name__")
    for value in (*VALUES, *types):
        odd[f"type {short(value)}"] = {**layout, "tensors": {**layout["tensors"], name: [file, value]}}
    files = ("../escaped.safetensors", str(tmp_path / "escaped.safetensors"), "config.json", "tokenizer.json")
    for value in (
        *VALUES,
        *files,
        "sub/x.safetensors",
        INDEX,
        ".",
        "..",
        "a\0.safetensors",
        "a" * 300 + ".safetensors",
    ):
        odd[f"file {short(value)}"] = {**layout, "tensors": {**layout["tensors"], name: [value, dtype]}}
    odd["copy of nothing"] = {**layout, "copies": {"lm_head.weight": "nothing"}}
    odd["copy that is listed nowhere"] = {**layout, "copies": {"x": name}}
    odd["a tensor of no model"] = {**layout, "tensors": {**layout["tensors"], "x": [file, dtype]}}
    odd["too long an entry"] = {**layout, "tensors": {**layout["tensors"], name: [file, dtype, 1]}}
    found = {
        case: damaged(tmp_path / "work", copies / "megatron", f"hf/{SOURCE}", json.dumps(value).encode())
        for case, value in odd.items()
    }
    assert not list(tmp_path.rglob("escaped*"))
    must(found, "refused")


def test_the_tracker(copies: Path, tmp_path: Path) -> None:
    """Catches: UnicodeDecodeError, int() of 5000 digits, a name too long for the file system; a line end,
    which Megatron's own reader allows, refused.
    """
    odd = [b"\xff\xfe", b"9" * 5000, b"9" * 300, b"9" * 19, b"", b"-1", b"1.5", "²".encode(), "٣".encode()]
    odd += [b"\0", b"release/", b"../release", b"a\nb", b"hf", b"release\nrelease"]
    found = {repr(text[:20]): damaged(tmp_path / "work", copies / "megatron", TRACKER, text) for text in odd}
    must(found, "refused")
    assert damaged(tmp_path / "work", copies / "megatron", TRACKER, b"release\n") == "accepted"


def test_the_arguments_of_a_checkpoint(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: `in` or `[]` on an args.dms that is no dict, int(inf) for the reached ratio, a field of the
    wrong type that only transformers would notice.
    """
    state = Reader(originals / "megatron" / "release").common()
    training = {"steps_per_cr": 100.0, "final_cr": 4.0, "anneal": "cr", "zeroing_steps": 0}
    fields = {**DMS, "predictor": "query_channel"}
    trained = {**fields, **training}
    odd: dict[str, dict[str, object]] = {}
    for value in (*VALUES, torch.ones(2)):
        if value is not None:
            odd[f"dms={short(value)}"] = {"args": {"dms": value}}
        odd[f"dms_reached_cr={short(value)}"] = {"args": {"dms": fields, "dms_reached_cr": value}}
        odd[f"iteration={short(value)}"] = {"args": {"dms": trained}, "iteration": value}
        for key in trained:
            odd[f"dms.{key}={short(value)}"] = {"args": {"dms": {**trained, key: value}}, "iteration": 50}
            if key in fields:
                odd[f"imported dms.{key}={short(value)}"] = {"args": {"dms": {**fields, key: value}}}
        for key in ("num_layers", "rope_parameters", "layernorm_epsilon", "vocab_size"):
            odd[f"{key}={short(value)}"] = {"args": {key: value}}
    for key in fields:
        less = {name: value for name, value in trained.items() if name != key}
        odd[f"no dms.{key}"] = {"args": {"dms": less}, "iteration": 50}
    found = {}
    for case, change in odd.items():
        args = Namespace(**{**vars(state["args"]), **change.get("args", {})})
        changed = {**state, **change, "args": args}
        monkeypatch.setattr(Reader, "common", lambda self, changed=changed: changed)
        found[case] = leaves_nothing(export_hf, originals / "megatron", tmp_path / "work")
    must(found, "accepted", "refused")
    for case in (
        "dms=[]",
        "dms={}",
        "dms='x'",
        "dms_reached_cr=inf",
        "dms_reached_cr=nan",
        "no dms.predictor",
    ):
        assert found[case] == "refused", case
    for key in fields:
        assert found[f"no dms.{key}"] == "refused", key


def test_the_common_state(copies: Path, tmp_path: Path) -> None:
    """Catches: [0] of an empty list, `.get` of what is no dict, KeyError for a missing iteration."""
    release, found = copies / "megatron" / "release", {}
    state = Reader(release).common()
    trained = {**DMS, "predictor": "query_channel", "steps_per_cr": 100.0, "final_cr": 4.0, "anneal": "cr"}
    args = Namespace(**{**vars(state["args"]), "dms": {**trained, "zeroing_steps": 0}})
    ends = {key: value for key, value in state.items() if key not in ("args", "iteration")}
    contents = {
        **{f"{short(value)}": value for value in VALUES if value != [[]]},
        **{f"[{short(value)}]": [value] for value in VALUES},
        **{f"args {short(value)}": [{**state, "args": value}] for value in VALUES},
        "two states": [state, state],
        "no args": [ends],
        "no iteration": [{**ends, "args": args}],
        "a tensor": torch.ones(3),
        "args a tensor": [{**state, "args": torch.ones(3)}],
    }
    for case, content in contents.items():
        store_again(release, COMMON_STATE, content)
        found[case] = leaves_nothing(export_hf, copies / "megatron", tmp_path / "work")
    must(found, "refused")


def test_the_older_common_pt(copies: Path, tmp_path: Path) -> None:
    """megatron-core before 0.19 wrote it. Catches: the same errors, on the other path."""
    megatron = copies / "megatron"
    state = Reader(megatron / "release").common()
    rewrite(megatron, {}, {}, iteration=2)
    found = {}
    folder = megatron / "iter_0000002"

    def forget(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[COMMON_STATE]
        del metadata.storage_data[MetadataIndex(COMMON_STATE)]

    edit_metadata(folder, forget)
    torch.save(state, folder / "common.pt")
    export_hf(megatron, tmp_path / "good")
    assert files_of(tmp_path / "good") == files_of(copies / "hf")
    for value in (*VALUES, torch.ones(2), {**state, "args": {}}):
        torch.save(value, folder / "common.pt")
        found[short(value)] = leaves_nothing(export_hf, megatron, tmp_path / "work")
        found[f"{short(value)}, args"] = outcome(lambda: checkpoint_args(megatron))
    (folder / "common.pt").write_bytes(b"\xff\xfe")
    found["bytes"] = leaves_nothing(export_hf, megatron, tmp_path / "work")
    must(found, "refused")
