"""Checks that no other test would miss: each test here covers one check, or a few of one kind."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms.conversion import CheckpointError, convert, export_files, export_hf, import_hf
from megatron_dms.conversion.hf_folder import INDEX, HFFolder
from megatron_dms.formats import torch_dist
from megatron_dms.formats.megatron_folder import SOURCE
from megatron_dms.formats.torch_dist import Chunk, Reader
from megatron_dms.upstream import torch_checkpoint
from tests.support.checkpoint_edits import DMS, edit_metadata, files_of, rewrite, store_again, tensors_of
from tests.support.hf_checkpoints import make_qwen3

FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
NORM, FC2 = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(convert_it: Callable[..., object], source: Path, out: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        convert_it(source, out)
    assert "\n" not in str(error.value) and not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": FIRST})),
            "holds model.norm.weight, which .* puts elsewhere",
        ),
        (
            lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].pop("model.norm.weight")),
            "holds model.norm.weight, which .* puts elsewhere",
        ),
        (
            lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].update({"ghost.weight": SECOND})),
            f"names ghost.weight, but {SECOND} lacks it",
        ),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
    ids=["in another file", "in no file", "in no shard", "adapter"],
)
def test_an_hf_folder_that_contradicts_itself_is_refused(
    damage: Callable[[Path], object], message: str, copies: Path, tmp_path: Path
) -> None:
    """Catches: `weight_map.get(name) != file`, `absent` or the adapter's line gone: then the stale half of a
    folder, or a base without its adapter, is converted in silence.
    """
    damage(copies / "hf")
    refused(import_hf, copies / "hf", tmp_path / "out", message)


def test_an_index_that_still_says_the_same_keeps_its_bytes(copies: Path, tmp_path: Path) -> None:
    """Catches: an index always written anew (keys of its metadata, order and white space would be lost)."""
    weight_map = json.loads((copies / "hf" / INDEX).read_text())["weight_map"]
    own = json.dumps({"weight_map": dict(reversed(weight_map.items())), "metadata": {"by": "hand"}}) + "\r\n"
    (copies / "hf" / INDEX).write_bytes(own.encode())
    import_hf(copies / "hf", tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(copies / "hf")


def test_the_index_of_a_retrofit_names_the_new_tensors(copies: Path, tmp_path: Path) -> None:
    """Catches: the old index copied though tensors were added, so that transformers initialises those at
    random; one that puts a tensor into another file than the export does.
    """
    from transformers import AutoModelForCausalLM

    prefix = "decoder.layers.self_attention.dms_predictor."
    predictor = {prefix + "norm.weight": torch.ones(2, 32), prefix + "proj.weight": torch.randn(2, 2, 32)}
    rewrite(copies / "megatron", predictor, {"dms": dict(DMS), "dms_reached_cr": 4.0}, iteration=7)
    export_hf(copies / "megatron", out := tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    stored = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored and len(set(stored.values())) == 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    model, loading = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True, dtype="auto"
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    found = model.state_dict()["model.layers.1.self_attn.dms_proj_alpha.weight"]
    assert torch.equal(found, predictor[prefix + "proj.weight"][1])


def test_one_shard_with_an_index_comes_back(tmp_path: Path) -> None:
    """save_pretrained of other programs writes such a folder. Catches: no index because there is only one
    file, so that nothing finds a file of that name."""
    source = make_qwen3(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors_of(source), "model-00001-of-00001.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)


def test_without_a_layout_files_are_of_a_limited_size(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: `_split` into a single file of any size, names without the number of files, a file above the
    limit because the first tensor that is too much still goes into it, no index.
    """
    limit = 20_000
    monkeypatch.setattr(export_files, "_SHARD_BYTES", limit)
    (tmp_path / "config").mkdir()
    shutil.copy(copies / "hf" / "config.json", tmp_path / "config")
    export_hf(copies / "megatron", out := tmp_path / "out", hf_source=tmp_path / "config")
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)
    ]
    assert {file.name for file in out.iterdir()} - {file.name for file in files} == {"config.json", INDEX}
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(held) <= limit for held in sizes if len(held) > 1) and max(map(len, sizes)) > 1
    # greedy: what begins a file would not have fitted into the one before
    order = [[info.nbytes for info in HFFolder(out).infos.values() if info.file == f.name] for f in files]
    assert all(sum(a) + b[0] > limit for a, b in itertools.pairwise(order))
    before, after = tensors_of(copies / "hf"), tensors_of(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_export_from_the_models_own_folder(copies: Path, tmp_path: Path) -> None:
    """--hf-source names a folder with weights, and the export takes over its layout. Catches: another
    layout, its old weights or index copied over the new ones, a side file lost, tensors of other layers."""
    shutil.rmtree(copies / "megatron" / "hf")
    refused(export_hf, copies / "megatron", tmp_path / "none", "name the model's folder by --hf-source")
    export_hf(copies / "megatron", tmp_path / "out", hf_source=copies / "hf")
    assert files_of(tmp_path / "out") == files_of(copies / "hf")
    rewrite(copies / "megatron", {NORM: torch.full((32,), 3.0)}, {}, iteration=3)
    export_hf(copies / "megatron", tmp_path / "trained", hf_source=copies / "hf")
    before, after = tensors_of(copies / "hf"), tensors_of(tmp_path / "trained")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.norm.weight"]
    assert torch.equal(after["model.norm.weight"], torch.full((32,), 3.0))


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_layout_of_another_version_is_refused(version: object, copies: Path, tmp_path: Path) -> None:
    """Catches: `version` of megatron_dms_source.json not looked at."""
    edit_json(copies / "megatron/hf" / SOURCE, lambda found: found.update(version=version))
    refused(export_hf, copies / "megatron", tmp_path / "out", f"has version {version!r}")


def drop_chunk(folder: Path, key: str) -> None:
    edit_metadata(folder, lambda metadata: metadata.state_dict_metadata[key].chunks.pop())


def describe(folder: Path) -> None:
    def change(metadata: object) -> None:
        for place in metadata.storage_data.values():
            place.transform_descriptors = ["zstd"]

    edit_metadata(folder, change)


def forget(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: metadata.storage_data.popitem())


def move(folder: Path, file: str) -> None:
    shutil.copy(folder / "__0_0.distcp", folder / file)
    edit_metadata(
        folder, lambda metadata: [setattr(p, "relative_path", file) for p in metadata.storage_data.values()]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: drop_chunk(d, NORM), f"{NORM} has 0 of 32 values"),
        (lambda d: drop_chunk(d, FC2), f"{FC2} has 0 of 1536 values"),
        (describe, "stored through"),
        (forget, "do not say where .* is"),
        (lambda d: move(d, "../__0_0.distcp"), "is no file of this folder"),
    ],
    ids=["whole", "layer", "transform", "place", "file"],
)
def test_a_chunk_that_cannot_be_read_is_refused(
    damage: Callable[[Path], object], message: str, copies: Path, tmp_path: Path
) -> None:
    """Catches: `covered != numel` gone (rows without a chunk are whatever was in memory), compressed bytes
    taken for values, KeyError for a chunk without a place, a file read outside of the folder.
    """
    damage(copies / "megatron" / "release")
    refused(export_hf, copies / "megatron", tmp_path / "out", message)


def test_a_chunk_stored_as_a_view_is_read_from_where_it_begins(copies: Path, tmp_path: Path) -> None:
    """Catches: `storage_offset` not added (the view's neighbours would be read), values with gaps between
    them read one after the other.
    """
    release = copies / "megatron" / "release"
    base = torch.arange(100, dtype=torch.float32)
    store_again(release, NORM, base[10:42])
    assert torch.equal(Reader(release).tensor(NORM), base[10:42])
    export_hf(copies / "megatron", tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["model.norm.weight"], base[10:42])
    store_again(release, NORM, base[:64:2])
    refused(export_hf, copies / "megatron", tmp_path / "gaps", "without gaps")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (NORM, (33,)),
        (FC2, (2, 33, 48)),
        (FC2, (3, 32, 48)),
        ("decoder.layers.self_attention.linear_qkv.weight", (2, 65, 32)),
        ("output_layer.weight", (131, 33)),
    ],
)
def test_tensors_of_another_shape_are_refused(
    key: str, shape: tuple[int, ...], copies: Path, tmp_path: Path
) -> None:
    """Catches: `shape != wanted` gone: the first rows would be exported and the others lost in silence."""
    rewrite(copies / "megatron", {key: torch.zeros(shape)}, {}, iteration=3)
    refused(
        export_hf, copies / "megatron", tmp_path / "out", f"{key} has shape .{', '.join(map(str, shape))}"
    )


def test_hidden_folders_are_left_out(copies: Path, tmp_path: Path) -> None:
    """Catches: the history of a clone (.git), or a download's .cache, copied into every output; a hidden
    file such as .gitattributes left out with them.
    """
    expected = files_of(copies / "hf") | {".gitattributes": b"*.safetensors lfs"}
    (copies / "hf" / ".gitattributes").write_bytes(expected[".gitattributes"])
    for name in (".git/config", ".git/objects/ab/cd", ".cache/huggingface/a.metadata", "chat/.cache/x"):
        (copies / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (copies / "hf" / name).write_bytes(b"x")
    import_hf(copies / "hf", tmp_path / "megatron")
    assert not [path for path in tmp_path.joinpath("megatron").rglob(".*") if path.is_dir()]
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == expected
    export_hf(tmp_path / "megatron", tmp_path / "other", hf_source=copies / "hf")
    assert not [path for path in (tmp_path / "other").rglob(".*") if path.is_dir()]


def _as_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(chunk: Chunk) -> Chunk:
        return replace(chunk, shape=chunk.shape[::-1])

    item, put = Chunk.write_item, torch_dist._write_tensor  # what is described, and what is written
    monkeypatch.setattr(Chunk, "write_item", lambda self: item(turned(self)))
    monkeypatch.setattr(
        torch_dist, "_write_tensor", lambda file, chunk, sizes: put(file, chunk, turned(chunk).sizes)
    )


def _misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    put = torch_dist._write_tensor
    monkeypatch.setattr(torch_dist, "_write_tensor", lambda file, chunk, sizes: put(file, chunk, sizes[::-1]))


def _without_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = torch_checkpoint._Writer.finish

    def lose(self: object, metadata: object, results: object) -> None:
        del metadata.state_dict_metadata["decoder.final_layernorm._extra_state/shard_0_1"]
        finish(self, metadata, results)

    monkeypatch.setattr(torch_checkpoint._Writer, "finish", lose)


def _cut(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = torch_checkpoint._Writer.finish

    def cut(self: object, metadata: object, results: object) -> None:
        finish(self, metadata, results)
        path = Path(self.fs.concat_path(self.path, "__0_0.distcp"))
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(torch_checkpoint._Writer, "finish", cut)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_as_a_row, "came out as torch.float32"),
        (_misplaced, "cannot read"),
        (_without_an_object, "objects came out as"),
        (_cut, "truncated"),
    ],
)
def test_what_import_wrote_is_looked_at_before_it_is_shown(
    damage: Callable[[pytest.MonkeyPatch], None],
    message: str,
    originals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: `_check_written`, or one of its comparisons, gone."""
    damage(monkeypatch)
    refused(import_hf, originals / "hf", tmp_path / "out", message)


def _transposed(write: Callable, path: Path, infos: dict, tensors: object) -> None:
    changed = {name: replace(info, shape=info.shape[::-1]) for name, info in infos.items()}
    write(path, changed, tensors)


def _one_less(write: Callable, path: Path, infos: dict, tensors: object) -> None:
    names = list(infos)[:-1]
    write(path, {name: infos[name] for name in names}, [pair for pair in tensors if pair[0] in names])


def _shorter(write: Callable, path: Path, infos: dict, tensors: object) -> None:
    write(path, infos, tensors)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_transposed, "header came out otherwise"),
        (_one_less, "header came out otherwise"),
        (_shorter, "truncated"),
    ],
)
def test_what_export_wrote_is_looked_at_before_it_is_shown(
    damage: Callable, message: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: the header not read again after writing."""
    write = convert.write_file
    monkeypatch.setattr(convert, "write_file", lambda *args: damage(write, *args))
    refused(export_hf, originals / "megatron", tmp_path / "out", message)


def test_an_export_within_the_zeroing_phase_is_refused(copies: Path, tmp_path: Path) -> None:
    """Catches: a model whose borrowed channel still takes part in attention, exported as one that runs
    without it; the last step of the phase (10 of 10) taken for the first one after it.
    """
    fields = {**DMS, "predictor": "query_channel", "zeroing_steps": 10, "steps_per_cr": 100, "final_cr": 4.0}
    for iteration in (1, 10):
        rewrite(copies / "megatron", {}, {"dms": fields}, iteration)
        refused(export_hf, copies / "megatron", tmp_path / "out", "zeroing phase of 10 steps")
    rewrite(copies / "megatron", {}, {"dms": fields}, 110)
    export_hf(copies / "megatron", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dms_cr"] == 2


def test_an_import_says_that_its_qkv_is_in_megatrons_order(originals: Path) -> None:
    """Catches: a checkpoint_version below 3, for which Megatron's loader reorders the fused QKV."""
    assert Reader(originals / "megatron" / "release").common()["checkpoint_version"] == 3.0


def test_a_tied_copy_survives_a_file_of_its_own(tmp_path: Path) -> None:
    """A tied model lies in two files; the second holds nothing but its written-out output layer. Catches:
    a layout that drops the file, or an index that no longer names it."""
    source = make_qwen3(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    embedding = tensors["model.embed_tokens.weight"]
    parts = {"a.safetensors": tensors, "b.safetensors": {"lm_head.weight": embedding}}
    for file, held in parts.items():
        save_file({k: v.clone() for k, v in held.items()}, source / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
