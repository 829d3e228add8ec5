"""Odd values wherever a conversion reads one: taken and given back, or refused in one line; never a
traceback, never an output that is begun and left.
"""

import json
import math
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_checkpoint_checks import edit_metadata, store_again
from test_checkpoint_dms_formats import FASTDMS, NVIDIA
from test_checkpoint_models import LLAMA3, MAKERS, YARN, make_llama, make_qwen3
from test_checkpoint_roundtrip import DMS, files_of, rewrite
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_dms.checkpoint import CheckpointError, export_hf, import_hf
from megatron_dms.checkpoint.families import config_keys, read_model
from megatron_dms.checkpoint.hf_folder import INDEX, HFFolder
from megatron_dms.checkpoint.megatron_folder import SOURCE, TRACKER, checkpoint_args
from megatron_dms.checkpoint.rope import attention_factor, inverse_frequencies
from megatron_dms.checkpoint.torch_dist import COMMON_STATE, Reader

VALUES = ([], {}, "x", "", -1, 0, 1, 1.5, True, False, None, math.nan, math.inf, [[]], 10**30, 10**400, "\n")
DEEP = "[" * 100_000
SECONDS = 2  # a value that makes a loop endless must not make the tests so


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("took longer than it may")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def outcome(call: Callable[[], object]) -> str:
    """ "accepted", "refused" (by a CheckpointError of one line), or what came instead."""
    try:
        with time_limit():
            call()
    except CheckpointError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"several lines: {str(error)!r}"
    except BaseException as error:
        traceback, place = error.__traceback__, ""
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if "megatron_dms" in code.co_filename:
                place = f"{Path(code.co_filename).name}:{traceback.tb_lineno} {code.co_name}"
            traceback = traceback.tb_next
        return f"{type(error).__name__} at {place}: {str(error)[:100]}"
    return "accepted"


def short(value: object) -> str:
    text = f"1e{len(str(value)) - 1}" if isinstance(value, int) and value > 1e9 else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf (Llama in three files), single (Qwen3 in one) and megatron (the first, imported): never changed."""
    folder = tmp_path_factory.mktemp("originals")
    make_llama(folder / "hf")
    make_qwen3(folder / "single")
    import_hf(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def copies(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals, tmp_path / "copies")
    return tmp_path / "copies"


def convert(source: Path, work: Path) -> None:
    """Import and export; the export must be the source."""
    import_hf(source, work / "out_megatron")
    export_hf(work / "out_megatron", work / "out_hf")
    assert files_of(work / "out_hf") == files_of(source), "it came back otherwise"


def leaves_nothing(convert_it: Callable[..., object], source: Path, work: Path) -> str:
    """Outcome of a conversion, and whether its output is there exactly if it was accepted."""
    work.mkdir(exist_ok=True)
    found = outcome(lambda: convert_it(source, work / "out"))
    left = [str(path.relative_to(work)) for path in work.rglob("*")]
    shutil.rmtree(work)
    if found == "accepted":
        return found if "out" in left else "accepted, but there is no output"
    return found if not left else f"{found}, and left {left[:3]}"


def must(found: dict[str, str], *allowed: str) -> None:
    """Fail with every case that came out otherwise."""
    bad = [f"{case}: {text}" for case, text in found.items() if text not in allowed]
    assert not bad, "\n".join(["", *bad])


def odd_configs(config: dict) -> Iterator[tuple[str, object, dict]]:
    """A config.json with one value after the other replaced, those of its RoPE object included."""
    for key in config:
        for value in VALUES:
            kept = {
                name: config[name] for name in config if (key, name) != ("num_hidden_layers", "layer_types")
            }
            yield key, value, {**kept, key: value}
            if key in ("rope_parameters", "rope_scaling"):
                for inner in config[key]:
                    yield key, value, {**config, key: {**config[key], inner: value}}


def before_transformers_5(config: dict) -> dict:
    """The same model, as older versions write it."""
    scaling = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    return old | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": config["dtype"]}


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "before"])
@pytest.mark.parametrize("name", MAKERS)
def test_config_json(name: str, old: bool, tmp_path: Path) -> None:
    """Catches: TypeError for a list where a set or a dict is asked, OverflowError of float(10**400), NaN or
    infinity let through as a number above 0, a loop over 10**30 layers.
    """
    rope = {} if name in ("llama", "mistral") else {"rope_parameters": dict(LLAMA3 if old else YARN)}
    source = MAKERS[name](tmp_path / "hf", torch.bfloat16, **rope)
    config = json.loads((source / "config.json").read_text())
    config |= {"attention_bias": False, "attention_dropout": 0.0, "layer_types": ["full_attention"] * 2}
    if name == "qwen2":
        del config["attention_bias"]
    if old:
        config = before_transformers_5(config)
    read_model(config)
    found, tried = {}, set()
    for key, value, changed in odd_configs(config):
        case = f"{key}={short(changed[key])} ({short(value)})"

        def read(changed: dict = changed) -> None:
            model = read_model(changed)
            model.family.megatron_args(model)
            assert math.isfinite(attention_factor(model.rope))
            assert (
                inverse_frequencies(model.rope, model.head_size if model.head_size < 10**4 else 64)
                .isfinite()
                .all()
            )

        found[case] = outcome(read)
        # a value that is not read comes back with its file: one such key stands for all
        kind = "without effect" if key in config_keys._WITHOUT_EFFECT else key
        if found[case] == "accepted" and (kind, repr(value)) not in tried:
            tried.add((kind, repr(value)))
            (source / "config.json").write_text(json.dumps(changed))
            work = tmp_path / "work"
            work.mkdir()
            found[case + ", converted"] = outcome(lambda work=work: convert(source, work))
            shutil.rmtree(work)
    assert len(found) > 300 and "accepted" in found.values()
    must(found, "accepted", "refused")


@pytest.mark.parametrize("separate", [False, True])
def test_dms_keys_of_config_json(separate: bool) -> None:
    """Catches: a ratio of NaN or infinity, a window of 10**400, a list for a choice."""
    base = {
        **json.loads('{"model_type": "qwen3", "rms_norm_eps": 1e-6, "hidden_size": 32}'),
        **{key: 2 for key in ("num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")},
        **{"max_position_embeddings": 64, "num_key_value_heads": 1, **NVIDIA, "dms_separate_alpha": separate},
        **{"dms_predictor": "linear" if separate else "query_channel", "dms_lag": 1},
    }
    read_model(base)
    found = {
        f"{key}={short(value)}": outcome(lambda key=key, value=value: read_model({**base, key: value}))
        for key in base
        for value in VALUES
    }
    must(found, "accepted", "refused")
    for key in ("dms_cr", "dms_tau", "dms_alpha_scale", "dms_initial_alpha_offset"):
        assert found[f"{key}=nan"] == found[f"{key}=inf"] == "refused", key


def test_dms_metadata_json(copies: Path, tmp_path: Path) -> None:
    """Catches: an export written with int(inf), a value that import takes and export then cannot say."""
    source, found = copies / "hf", {}
    cases: dict[str, object] = {f"config={short(value)}": {"config": value} for value in VALUES}
    for key, value in ((key, value) for key in FASTDMS["config"] for value in VALUES):
        cases[f"{key}={short(value)}"] = {**FASTDMS, "config": {**FASTDMS["config"], key: value}}
    for case, content in cases.items():
        (source / "dms_metadata.json").write_text(json.dumps(content))
        model = outcome(lambda: read_model(*(lambda f: (f.config, f.dms_metadata))(HFFolder(source))))
        found[case] = model
        if model == "accepted" and not case.startswith(("model", "context_len", "compression_mode")):
            work = tmp_path / "work"
            work.mkdir()
            found[case + ", converted"] = outcome(lambda work=work: convert(source, work))
            shutil.rmtree(work)
    must(found, "accepted", "refused")
    assert found["target_cr=inf"] == found["alpha_scale=nan"] == "refused"


def damaged(work: Path, source: Path, name: str, content: bytes) -> str:
    """Outcome of converting a folder with one file replaced; the folder is as before afterwards."""
    convert_it = export_hf if (source / TRACKER).exists() else import_hf
    before = (source / name).read_bytes()
    (source / name).write_bytes(content)
    try:
        return leaves_nothing(convert_it, source, work)
    finally:
        (source / name).write_bytes(before)


def header(source: Path) -> tuple[dict, bytes]:
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(text: str, rest: bytes) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + rest


def test_json_nested_too_deep(copies: Path, tmp_path: Path) -> None:
    """Catches: RecursionError, which is no ValueError, in any of the files that are parsed."""
    hf, single, megatron = (copies / name for name in ("hf", "single", "megatron"))
    (hf / "dms_metadata.json").write_text("{}")
    places = [
        *((hf, name) for name in ("config.json", INDEX, "dms_metadata.json")),
        *((megatron, name) for name in ("hf/config.json", f"hf/{SOURCE}", "release/metadata.json")),
    ]
    found = {}
    for text in (DEEP, '{"a":' * 100_000, f'{{"model_type": {DEEP}'):
        for folder, name in places:
            found[f"{name}, {text[:9]}"] = damaged(tmp_path / "work", folder, name, text.encode())
        content = with_header(text, header(single)[1])
        found[f"header, {text[:9]}"] = damaged(tmp_path / "work", single, "model.safetensors", content)
    must(found, "refused")


def test_safetensors_headers(copies: Path, tmp_path: Path) -> None:
    """Catches: a shape, type or place of a header used before it is looked at; two lines for a name."""
    entries, rest = header(copies / "single")
    name = next(key for key in entries if key != "__metadata__")
    found = {}
    odd: dict[str, object] = {f"header {short(value)}": value for value in VALUES}
    odd |= {f"entry {short(value)}": {**entries, name: value} for value in VALUES}
    for key in ("dtype", "shape", "data_offsets"):
        for value in (*VALUES, [None, None], [0, math.nan], [10**400, 10**400], [-1, 1], [0], [True, True]):
            odd[f"{key} {short(value)}"] = {**entries, name: {**entries[name], key: value}}
    odd["name of two lines"] = {**entries, "a\nb": entries[name]}
    odd["surplus, name of two lines"] = {
        **entries,
        "a\nb": {"dtype": "F32", "shape": [0], "data_offsets": [len(rest)] * 2},
    }
    for case, value in odd.items():
        content = with_header(json.dumps(value), rest)
        found[case] = damaged(tmp_path / "work", copies / "single", "model.safetensors", content)
    for case, content in {"bytes": b"\xff\xfe" * 8, "empty": b"", "length": b"\xff" * 8 + rest}.items():
        found[case] = damaged(tmp_path / "work", copies / "single", "model.safetensors", content)
    must(found, "refused")


def test_folders_in_the_place_of_files(copies: Path, tmp_path: Path) -> None:
    """Catches: IsADirectoryError from a reader that asks only whether something is there."""
    found = {}
    hf, single, megatron = (copies / name for name in ("hf", "single", "megatron"))
    for source, name in (
        *((hf, name) for name in ("config.json", INDEX, "model-00001-of-00003.safetensors")),
        (single, "model.safetensors"),
        *((megatron, name) for name in (TRACKER, "release/.metadata", "release/__0_0.distcp")),
    ):
        (source / name).rename(tmp_path / "kept")
        (source / name).mkdir()
        convert_it = export_hf if source == megatron else import_hf
        found[name] = leaves_nothing(convert_it, source, tmp_path / "work")
        (source / name).rmdir()
        (tmp_path / "kept").rename(source / name)
    must(found, "refused")


def test_the_index(copies: Path, tmp_path: Path) -> None:
    """Catches: a set of unhashable values, sorting None among names, a file read from outside the folder."""
    index = json.loads((copies / "hf" / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    shutil.copy(copies / "hf" / file, copies / "x.safetensors")  # or it would be refused as missing
    (copies / "hf" / "sub").mkdir()
    shutil.copy(copies / "hf" / file, copies / "hf" / "sub" / "x.safetensors")
    odd = {}
    files = ("../x.safetensors", str(copies / "x.safetensors"), "sub/x.safetensors", ".", "..", "config.json")
    for value in (*VALUES, 3, *files, "a\0b", "a" * 300):
        odd[f"one tensor in {short(value)}"] = {**index, "weight_map": {**index["weight_map"], name: value}}
        moved = {key: value if put == file else put for key, put in index["weight_map"].items()}
        odd[f"a whole file in {short(value)}"] = {**index, "weight_map": moved}
    for value in VALUES:
        odd[f"weight_map {short(value)}"] = {**index, "weight_map": value}
        odd[f"index {short(value)}"] = value
    found = {
        case: damaged(tmp_path / "work", copies / "hf", INDEX, json.dumps(value).encode())
        for case, value in odd.items()
    }
    must(found, "refused")


def test_the_layout_kept_by_an_import(copies: Path, tmp_path: Path) -> None:
    """megatron_dms_source.json. Catches: getattr(torch, ...) of any name, a file written outside of the
    output or over config.json, a tensor exported that no model has, KeyError for what is not there.
    """
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
    """megatron-core before 0.19. Catches: the same, on the other path."""
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
