"""The training samples: chunks worked out by hand, every target exactly once, an order that depends on
seed and epoch alone, and corrupt files."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_dms.data import data_flags, dataset
from megatron_dms.data.data_flags import DataConfig, Source, data_config, validate_data_args
from megatron_dms.data.dataset import ChatDataset, build_datasets, train_valid_test_datasets_provider
from megatron_dms.data.token_files import TokenFile, check_pair
from megatron_dms.errors import DataError


def write_set(folder: Path, documents: list[list[int]], masks: list[list[int]] | None = None) -> str:
    """Write the four files that preprocessing writes; every token counts if no masks are given."""
    prefix = str(folder / "set")
    masks = masks if masks is not None else [[1] * len(document) for document in documents]
    for name, rows, dtype in ((prefix, documents, np.uint16), (f"{prefix}_loss_mask", masks, np.uint8)):
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=dtype)
        for row in rows:
            builder.add_document(np.asarray(row), [len(row)])
        builder.finalize(f"{name}.idx")
    return prefix


def test_chunks_by_hand(tmp_path: Path) -> None:
    """A document of 6 tokens at T = 3 gives inputs 10 11 12 | 13 14 · with labels 11 12 13 | 14 15 ·.

    Catches: chunks without the one token of overlap (13 is never predicted), labels not shifted, the mask
    taken from the input in place of the label, padding that counts, positions that go on across chunks.
    """
    prefix = write_set(tmp_path, [[10, 11, 12, 13, 14, 15]], [[1, 0, 1, 1, 0, 1]])
    dataset = ChatDataset(prefix, 3, shuffle=False, pad_token=9)
    assert len(dataset) == 2
    first, second = dataset[0], dataset[1]
    assert first["tokens"].tolist() == [10, 11, 12] and first["labels"].tolist() == [11, 12, 13]
    assert first["loss_mask"].tolist() == [0.0, 1.0, 1.0] and first["valid"].tolist() == [True] * 3
    assert second["tokens"].tolist() == [13, 14, 9] and second["labels"].tolist() == [14, 15, 9]
    assert second["loss_mask"].tolist() == [0.0, 1.0, 0.0] and second["valid"].tolist() == [True, True, False]
    assert first["position_ids"].tolist() == second["position_ids"].tolist() == [0, 1, 2]
    assert [int(sample["sample_id"]) for sample in (first, second)] == [0, 1]
    kinds = {name: value.dtype for name, value in first.items()}
    assert kinds["tokens"] == kinds["labels"] == kinds["position_ids"] == kinds["sample_id"] == torch.int64
    assert kinds["loss_mask"] == torch.float32 and kinds["valid"] == torch.bool


def test_exact_fit_and_tiny_documents(tmp_path: Path) -> None:
    """T + 1 tokens are one full sample, one token is none, two are one; samples never mix documents.

    Catches: n // T samples (an empty one after an exact fit), searchsorted from the left (documents of no
        sample).
    """
    prefix = write_set(tmp_path, [[1], [2, 3, 4, 5], [6], [], [7, 8]])
    dataset = ChatDataset(prefix, 3, shuffle=False)
    assert [dataset[i]["tokens"].tolist() for i in range(len(dataset))] == [[2, 3, 4], [7, 0, 0]]
    with pytest.raises(IndexError, match="found sample 2, expected 0 to 1"):
        dataset[2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=9).filter(lambda rows: max(rows) > 1),
    seq_length=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
)
def test_every_target_once_per_epoch(
    tmp_path: Path, lengths: list[int], seq_length: int, seed: int, epoch: int
) -> None:
    """Over an epoch each token but a document's first is a label exactly once, after its own predecessor.

    Catches: a chunk boundary off by one, samples lost or doubled by the permutation, epochs of another
        length.
    """
    starts = np.cumsum([0, *lengths])  # every token differs
    documents = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    prefix = write_set(tmp_path, documents)
    one = ChatDataset(prefix, seq_length, shuffle=False)
    dataset = ChatDataset(prefix, seq_length, len(one) * (epoch + 1), seed=seed)
    seen = []
    for index in range(len(one) * epoch, len(one) * (epoch + 1)):
        sample = dataset[index]
        real = sample["valid"]
        assert torch.equal(sample["labels"][real], sample["tokens"][real] + 1)
        assert torch.equal(sample["loss_mask"].bool(), real)
        seen += sample["labels"][real].tolist()
    assert sorted(seen) == sorted(token for document in documents for token in document[1:])


def order(dataset: ChatDataset, indices: range) -> list[int]:
    return [dataset.sample_of(index) for index in indices]


def test_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    """The order has fixed values, differs between epochs and seeds, and does not depend on how it is asked
    for.

    Catches: any change of the generator (the golden values), epochs that repeat the first, a permutation kept
    from another epoch, the global generators being used, num_samples entering the order.
    """
    prefix = write_set(tmp_path, [[1, 2]] * 8)
    dataset = ChatDataset(prefix, 4, 24, seed=1234)
    golden = [[1, 6, 2, 0, 3, 5, 7, 4], [3, 6, 7, 0, 5, 4, 1, 2]]
    assert [order(dataset, range(8)), order(dataset, range(8, 16))] == golden
    torch.manual_seed(1)
    np.random.seed(1)
    longer = ChatDataset(prefix, 4, 1000, seed=1234)
    backwards = [longer.sample_of(index) for index in reversed(range(24))][::-1]
    assert backwards == order(dataset, range(24)) == order(pickle.loads(pickle.dumps(dataset)), range(24))
    assert order(ChatDataset(prefix, 4, 24, seed=1235), range(8)) != golden[0]
    assert order(ChatDataset(prefix, 4, 24, shuffle=False), range(10)) == [*range(8), 0, 1]


@pytest.mark.parametrize(("data_parallel", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batches_are_the_same_under_every_layout(data_parallel: int, micro_batch: int) -> None:
    """Megatron's sampler: step s takes the ids [8 s, 8 s + 8), microbatch m of rank r from (m · DP + r) ·
    size on.

    Catches: a Megatron whose sampler orders ids by rank, on which data order (and noise) would depend on the
        layout.
    """
    consumed, batch, steps = 16, 8, 3
    ranks = [
        list(MegatronPretrainingSampler(40, consumed, micro_batch, rank, data_parallel))
        for rank in range(data_parallel)
    ]
    microbatches = batch // (data_parallel * micro_batch)
    for step in range(steps):
        ids = [ranks[r][step * microbatches + m] for m in range(microbatches) for r in range(data_parallel)]
        first = consumed + step * batch
        assert [index for microbatch in ids for index in microbatch] == list(range(first, first + batch))


def test_collated_batch(tmp_path: Path) -> None:
    """Catches: a field that torch's default collation cannot stack."""
    dataset = ChatDataset(write_set(tmp_path, [[1, 2, 3], [4, 5]]), 4, 4)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]], num_workers=0)))
    assert batch["tokens"].shape == (2, 4) and batch["sample_id"].tolist() == [0, 1]


def damage(path: Path, **changes: object) -> None:
    """Overwrite bytes `at`, or keep only the first `keep` bytes."""
    content = bytearray(path.read_bytes())
    if "keep" in changes:
        content = content[: changes["keep"]]
    else:
        new = changes["new"]
        content[changes["at"] : changes["at"] + len(new)] = new
    path.write_bytes(content)


HEADER = 34  # bytes: magic 9, version 8, data type 1, two counts of 8
CORRUPT = [
    ("set.idx", {"keep": 0}, "set.idx: found b''"),
    ("set.idx", {"keep": 20}, "found 20 bytes, expected a header of 34"),
    ("set.idx", {"keep": HEADER + 5}, "set.idx: found 39 bytes, expected"),
    ("set.idx", {"at": 0, "new": b"XX"}, r"found b'XXIDIDX"),
    ("set.idx", {"at": 9, "new": b"\x02"}, "found version 2 and data type 8"),
    ("set.idx", {"at": 17, "new": b"\x09"}, "found version 1 and data type 9"),
    ("set.idx", {"at": 17, "new": b"\x03"}, "found int16 entries, expected token ids"),
    ("set.idx", {"at": HEADER, "new": b"\x04"}, "found offsets that do not follow from the lengths"),
    ("set.idx", {"at": HEADER + 2 * 12 + 8, "new": b"\x02"}, "expected one sequence in each"),
    ("set.bin", {"keep": 8}, "set.bin: found 8 bytes, expected 10"),
    ("set_loss_mask.bin", {"keep": 4}, "set_loss_mask.bin: found 4 bytes, expected 5"),
    ("set_loss_mask.bin", {"at": 1, "new": b"\x02"}, "found the value 2, expected 0 or 1"),
    ("set_loss_mask.idx", {"at": 17, "new": b"\x02"}, "found int8 entries, expected uint8"),
    ("set.bin", {"at": 8, "new": b"\x64\x00"}, "found token id 100, expected ids from 0 to 99"),
]


@pytest.mark.parametrize(("name", "changes", "found"), CORRUPT)
def test_corrupt_files_are_named(tmp_path: Path, name: str, changes: dict[str, object], found: str) -> None:
    """Catches: each of check_pair's conditions removed. All are found within a second, in one line."""
    prefix = write_set(tmp_path, [[1, 2, 3], [4, 5]])
    check_pair(prefix, vocab_size=100)
    damage(tmp_path / name, **changes)
    start = time.monotonic()
    with pytest.raises(DataError, match=found) as error:
        check_pair(prefix, vocab_size=100)
    assert time.monotonic() - start < 1
    assert "\n" not in str(error.value) and "; " in str(error.value)


@pytest.mark.parametrize("name", ["set.idx", "set.bin", "set_loss_mask.idx", "set_loss_mask.bin"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    """Catches: a file of the four not looked for."""
    prefix = write_set(tmp_path, [[1, 2, 3]])
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: found no such file"):
        check_pair(prefix)


def test_masks_of_other_documents_are_refused(tmp_path: Path) -> None:
    """The masks have the same total size, but belong to other documents. Catches: only sizes or only
    counts compared."""
    with pytest.raises(DataError, match="found 2 entries in document 0, expected 3"):
        check_pair(write_set(tmp_path, [[1, 2, 3], [4, 5]], [[1, 1], [1, 1, 1]]))
    with pytest.raises(DataError, match="found 1 documents, expected 2"):
        check_pair(write_set(tmp_path, [[1, 2, 3], [4, 5]], [[1, 1, 1, 1, 1]]))


def test_token_ids_in_the_middle_are_checked_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: the check at reading removed, so that an id beyond the embedding is a CUDA assertion."""
    prefix = write_set(tmp_path, [[1, 2], [3, 500], [4, 5]])
    monkeypatch.setattr("megatron_dms.data.token_files._SAMPLED_ENTRIES", 2)
    dataset = ChatDataset(prefix, 4, shuffle=False, vocab_size=100)
    assert dataset[0]["tokens"][0] == 1
    with pytest.raises(DataError, match="found token id 500 in document 1"):
        dataset[1]


def test_splits_are_contiguous_and_complete(tmp_path: Path) -> None:
    """10 documents are split 8,1,1: 0…7 are shuffled, 8 and 9 stay in order. Catches: overlapping or
    shuffled validation documents."""
    prefix = write_set(tmp_path, [[10 * k, 10 * k + 1] for k in range(10)])
    config = data_config(arguments(data_path=[prefix], split="8,1,1"))
    train, valid, test = build_datasets(config, (8, 3, 1))
    assert train is not None and valid is not None and test is not None
    assert sorted(int(train[i]["tokens"][0]) // 10 for i in range(8)) == list(range(8))
    assert [int(valid[i]["tokens"][0]) for i in range(3)] == [80, 80, 80]
    assert int(test[0]["tokens"][0]) == 90
    assert [dataset.split for dataset in (train, valid, test)] == list(Split)
    assert build_datasets(config, (8, 0, 0))[1:] == [None, None]


def test_empty_splits(tmp_path: Path) -> None:
    """No test documents is fine; no validation documents while validation steps are asked for is an error."""
    prefix = write_set(tmp_path, [[1, 2]] * 4)
    whole, half = Source(prefix), Source(prefix, 0.5, 1.0)
    assert build_datasets(DataConfig((whole, half, None), 4, 1), (8, 3, 1))[2] is None
    with pytest.raises(DataError, match="--eval-iters: found validation steps but no validation data"):
        build_datasets(DataConfig((whole, Source(prefix, 0.99, 1.0), None), 4, 1), (8, 3, 1))
    with pytest.raises(DataError, match="no document for training"):
        build_datasets(DataConfig((Source(prefix, 0.0, 0.01), half, None), 4, 1), (8, 3, 1))
    with pytest.raises(DataError, match="found no document of two tokens or more"):
        ChatDataset(write_set(tmp_path, [[1], [2]]), 4)


def arguments(**changes: object) -> Namespace:
    """Return the part of Megatron's namespace that is read here, at its defaults."""
    defaults: dict[str, object] = dict.fromkeys(("data_path", "split", "dataloader_type"))
    defaults |= {f"{name}_data_path": None for name in ("train", "valid", "test")}
    defaults |= {"seq_length": 4, "seed": 7, "consumed_train_samples": 16, "consumed_valid_samples": 2}
    return Namespace(**(defaults | changes))


REFUSALS = [
    ({}, "--data-path: found no training data"),
    ({"data_path": ["0.3", "a", "0.7", "b"]}, "--data-path: found 4 entries"),
    ({"train_data_path": ["a", "b"]}, "--train-data-path: found 2 entries"),
    ({"train_data_path": ["a"], "data_path": ["b"]}, "--data-path: found it beside --train-data-path"),
    ({"train_data_path": ["a"], "split": "1,0,0"}, "--split: found 1,0,0 beside --train-data-path"),
    ({"valid_data_path": ["a"]}, "--data-path: found no training data"),
    ({"data_path": ["a"], "split": "1,x"}, "--split: found 1,x"),
    ({"data_path": ["a"], "split": "0,1,0"}, "--split: found 0,1,0"),
    ({"data_path": ["a"], "split": "1,1,1,1"}, "--split: found 1,1,1,1"),
    ({"data_path": ["a"], "split": "nan"}, "--split: found nan"),
    ({"data_path": ["a"], "dataloader_type": "cyclic"}, "--dataloader-type: found cyclic, expected single"),
    ({"data_path": ["a"], "dataloader_type": "external"}, "--dataloader-type: found external"),
]
REFUSALS += [({"data_path": ["a"], attribute: True}, flag) for attribute, flag, _ in data_flags._REFUSED]


@pytest.mark.parametrize(("changes", "found"), REFUSALS)
def test_flags_are_refused_by_name(changes: dict[str, object], found: str) -> None:
    """Catches: a flag that would be accepted and ignored."""
    with pytest.raises(DataError, match=found) as error:
        data_config(arguments(**changes))
    assert "\n" not in str(error.value)


def test_refused_flags_are_megatrons() -> None:
    """Every refused flag exists in this Megatron, under that attribute. Catches: a name that was changed
    upstream."""
    from megatron.training.arguments import add_megatron_arguments

    known = {
        action.dest: action.option_strings for action in add_megatron_arguments(ArgumentParser())._actions
    }
    for attribute, flag, _ in data_flags._REFUSED:
        assert flag in known.get(attribute, [])
    for name in vars(arguments()):
        assert name in known or name.startswith("consumed_")


def test_validate_looks_at_the_files(tmp_path: Path) -> None:
    """Catches: a start-up check that reads the flags only, or leaves for later what it knows."""
    prefix = write_set(tmp_path, [[1, 2]])
    run = {"train_data_path": [prefix], "eval_iters": 0, "vocab_size": 50}
    validate_data_args(arguments(**run))
    with pytest.raises(DataError, match=r"no/such.idx: found no such file"):
        validate_data_args(arguments(**run, valid_data_path=["no/such"]))
    with pytest.raises(DataError, match="--eval-iters: found 5 and no validation data"):
        validate_data_args(arguments(**run | {"eval_iters": 5}))
    with pytest.raises(DataError, match="token id 2"):
        validate_data_args(arguments(**run | {"vocab_size": 2}))


def test_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the provider as pretrain() does: every rank builds, the padding comes from the tokenizer, and
    a finished run may start again. Catches: is_distributed missing, a length of exactly what is consumed
    (the sampler asserts), the padding token or the vocabulary size not passed on."""
    prefix = write_set(tmp_path, [[1, 2]] * 10)
    tokenizer = Namespace(pad=3, vocab_size=50)
    monkeypatch.setattr("megatron.training.get_args", lambda: arguments(data_path=[prefix], split="8,2,0"))
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: tokenizer)
    assert train_valid_test_datasets_provider.is_distributed
    train, valid, test = train_valid_test_datasets_provider((16, 2, 0), vp_stage=1)
    assert train is not None and valid is not None and test is None
    assert train[0]["tokens"].tolist() == [1, 3, 3, 3]
    assert (train.seed, train.vocab_size, valid.shuffle) == (7, 50, False)
    MegatronPretrainingSampler(len(train), 16, 1, 0, 1)
    tokenizer.pad = -1  # a tokenizer without padding
    assert train_valid_test_datasets_provider((16, 2, 0))[0][0]["tokens"].tolist() == [1, 0, 0, 0]


def test_names_are_in_one_place() -> None:
    """Catches: dataset.py losing the names that others import from it."""
    assert {"ChatDataset", "DataError", "check_pair", "train_valid_test_datasets_provider"} <= set(
        dataset.__all__
    )


def test_a_file_that_dies_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut short, made unreadable, or removed. Catches: a memory map (the test would die of a
    bus error), garbage in place of missing bytes, an error without the file's name, a reader that a worker
    cannot be given."""
    prefix = write_set(tmp_path, [[1, 2, 3], [4, 5, 6, 7]])
    tokens = TokenFile(prefix)
    assert list(tokens.read(1, 1, 2)) == list(pickle.loads(pickle.dumps(tokens)).read(1, 1, 2)) == [5, 6]
    path = Path(f"{prefix}.bin")
    os.truncate(path, 10)
    assert list(tokens.read(0, 0, 3)) == [1, 2, 3]
    with pytest.raises(DataError, match=rf"{path}: found 2 bytes at byte 8, expected 6: .* cut short"):
        tokens.read(1, 1, 3)
    path.unlink()
    assert list(tokens.read(0, 0, 3)) == [1, 2, 3]  # an open file outlives its name

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(DataError, match=rf"{path}: cannot be read at byte 0: Input/output error"):
        tokens.read(0, 0, 3)
