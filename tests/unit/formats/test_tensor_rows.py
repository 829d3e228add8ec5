"""Tensors are read a few rows at a time: every piece lands where it belongs, however the tensor is stored."""

import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dms.conversion import CheckpointError, set_model_args
from megatron_dms.conversion.transforms import FusedQKV, Vocabulary, joined, part_of
from megatron_dms.formats import tensor_rows
from megatron_dms.formats.tensor_rows import FileRows, Span, read_all
from megatron_dms.formats.torch_dist import Chunk, Reader, ShardedRows, _Shard, write
from tests.support.checkpoint_edits import join


def on_disk(path: Path, tensor: torch.Tensor) -> FileRows:
    """Store the tensor behind 3 bytes of something else."""
    path.write_bytes(b"..." + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return FileRows(path, 3, tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_fused_qkv_in_pieces_of_any_size(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: rows lost or doubled at the edge of a piece; parts in each other's places; either way."""
    monkeypatch.setattr(tensor_rows, "_PIECE_BYTES", piece)
    shapes = ((24, 5), (12, 5), (12, 5))
    row = FusedQKV("decoder.layers.x", ("q", "k", "v"), shapes, 3)
    parts = [torch.randn(shape).bfloat16() for shape in shapes]
    sources = [on_disk(tmp_path / name, part) for name, part in zip("qkv", parts, strict=True)]
    pieces = [found.clone() for span in joined(row, row.hf, sources) for found in span.pieces()]
    assert torch.equal(torch.cat(pieces), join(row, parts))
    whole = on_disk(tmp_path / "whole", join(row, parts))
    for number, part in enumerate(parts):
        spans = part_of(row, number, "qkv"[number], whole)
        assert torch.equal(torch.cat([found.clone() for span in spans for found in span.pieces()]), part)


def test_shards_of_both_axes_make_one_tensor(tmp_path: Path) -> None:
    """Catches: a row offset within a shard forgotten, or columns of one rank written over another's."""
    whole = torch.randn(7, 6, 2)
    boxes = [(0, 3, 0, 4), (0, 3, 4, 6), (3, 7, 0, 4), (3, 7, 4, 6)]
    shards = []
    for r0, r1, c0, c1 in boxes:
        stored = torch.full((r1 - r0 + 2, c1 - c0 + 1, 2), torch.nan)  # what is wanted lies inside of it
        stored[1:-1, 1:] = whole[r0:r1, c0:c1]
        source = on_disk(tmp_path / f"{r0}{c0}", stored)
        shards.append(_Shard(source, (1, 1, 0), (r0, c0, 0), (r1 - r0, c1 - c0, 2)))
    sharded = ShardedRows((7, 6, 2), torch.float32, shards)
    assert torch.equal(read_all(sharded), whole)
    for start in range(7):
        span = Span("x", sharded, start, min(3, 7 - start))
        assert torch.equal(next(span.pieces()), whole[start : start + 3])


def test_what_is_written_in_pieces_is_what_torch_reads(tmp_path: Path) -> None:
    """Catches: a hole of torch.save's filled at the wrong place: torch's own reader must agree, and a piece
    too few must be noticed.
    """
    whole = torch.randn(2, 4, 3)
    chunks = [
        Chunk("decoder.layers.x", (4, 3), torch.float32, lambda n=n: iter(whole[n].split(3)), n, 2)
        for n in range(2)
    ]
    write(tmp_path, chunks, ["object"], {"args": None})
    from torch.distributed.checkpoint import FileSystemReader, load

    found = {"decoder.layers.x": torch.zeros(2, 4, 3)}
    load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(found["decoder.layers.x"], whole)
    assert torch.equal(Reader(tmp_path).tensor("decoder.layers.x", 1), whole[1])
    short = [Chunk("x", (4, 3), torch.float32, lambda: [whole[0][:3]])]
    with pytest.raises(RuntimeError, match="made 36 bytes"):
        write(tmp_path, short, [], {})


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Catches: an endless loop, or zeros, at the end of a file."""
    source = on_disk(tmp_path / "x", torch.randn(4, 3))
    source.path.write_bytes(source.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends in the middle"):
        read_all(source)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 400),
    multiple=st.sampled_from([1, 3, 8, 64, 128]),
    tp=st.sampled_from([1, 2, 4, 8]),
    hidden=st.integers(1, 5),
)
def test_padding_of_any_vocabulary_at_any_layout_is_left_out(
    vocab: int, multiple: int, tp: int, hidden: int
) -> None:
    """Each rank saves one chunk of a padded vocabulary. Catches: rows lost, doubled or left over where the
    last rank holds some padding, or only padding."""
    args = Namespace(make_vocab_size_divisible_by=multiple, tensor_model_parallel_size=tp)
    set_model_args(args, Namespace(rope_parameters={}, vocab_size=vocab))
    padded = args.padded_vocab_size
    assert padded >= vocab and padded % (multiple * tp) == 0 and padded - vocab < multiple * tp
    row = Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((vocab, hidden),))
    weight = torch.randn(padded, hidden)
    row.check_rows(padded)
    size = padded // tp
    with tempfile.TemporaryDirectory() as name:
        ranks = [on_disk(Path(name, f"{i}"), part) for i, part in enumerate(weight.split(size))]
        shards = [_Shard(part, (0, 0), (i * size, 0), (size, hidden)) for i, part in enumerate(ranks)]
        stored = ShardedRows((padded, hidden), torch.float32, shards)
        spans = part_of(row, 0, row.hf[0], stored)
        found = torch.cat([piece.clone() for span in spans for piece in span.pieces()])
    assert torch.equal(found, weight[:vocab])
