"""The token files that training reads: which files there are, and whether they fit each other.

A data set PREFIX consists of four files in Megatron's indexed format (one document per sequence):

    PREFIX.bin, PREFIX.idx                        token ids, uint16 or int32
    PREFIX_loss_mask.bin, PREFIX_loss_mask.idx    uint8, same lengths; 1 = the token is a prediction target

Nothing here imports Megatron or torch, so a launcher can check its data in well under a second.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dms.errors import DataError

REMAKE = "make the files again with tools/preprocess_data.py"
_MAGIC = b"MMIDIDX\x00\x00"
# magic, version, code of the data type, number of sequences, length of the document table
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = dict(
    enumerate((np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16), start=1)
)
_TOKEN_DTYPES = (np.uint16, np.int32, np.int64)
# Token ids and mask values are checked in this many entries at either end of the file. That finds files made
# with another tokenizer and damaged ends, and takes a fraction of a second for files of many GB.
_SAMPLED_ENTRIES = 1 << 20
_DIGEST_BLOCKS, _DIGEST_BLOCK = 64, 1 << 16  # number, bytes


def loss_mask_prefix(prefix: str) -> str:
    """Prefix of the loss-mask files that belong to the token files `prefix`."""
    return f"{prefix}_loss_mask"


class TokenFile:
    """One .bin/.idx pair, open for reading.

    The .bin file is read by plain reads and not through a memory map: if a mapped file is cut short, or its
    disk fails, a bus error kills the process, and nobody learns which file it was. The index is in memory.

    Raises:
        DataError: a file is missing or damaged, see check_pair.
    """

    def __init__(self, prefix: str) -> None:
        index = _read_index(prefix)
        self.path = Path(f"{prefix}.bin")
        self.lengths = np.array(index.lengths)
        """[documents] int32, in entries."""
        self._dtype = np.dtype(index.dtype)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._file = self.path.open("rb", buffering=0)

    def __reduce__(self) -> tuple[type[TokenFile], tuple[str]]:
        """Let a spawned worker of a data loader open the file anew."""
        return TokenFile, (str(self.path.with_suffix("")),)

    def read(self, document: int, begin: int, count: int) -> np.ndarray:
        """Read `count` entries of a document, from its entry `begin`.

        Raises:
            DataError: the file cannot be read, or is shorter than its index says.
        """
        size = self._dtype.itemsize
        offset = int(self._starts[document] + begin) * size
        try:
            data = os.pread(self._file.fileno(), count * size, offset)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
        if len(data) < count * size:
            raise DataError(
                f"{self.path}: found {len(data)} bytes at byte {offset}, expected {count * size}: the file "
                "was cut short since the run started"
            )
        return np.frombuffer(data, self._dtype)


@dataclass(frozen=True)
class _Index:
    dtype: type
    lengths: np.ndarray  # [documents] int32, in entries


def check_pair(prefix: str, vocab_size: int | None = None) -> None:
    """Check the four files of a data set against each other.

    Args:
        prefix: path without ".bin"/".idx".
        vocab_size: number of token ids of the model (ids must be below it); None leaves the ids unchecked.

    Raises:
        DataError: a file is missing, an index is damaged, a .bin has another size than its index says, the
            loss mask has other document lengths, or (in the first and last million entries) a token id or
            mask value is out of range.
    """
    tokens = _read_index(prefix)
    mask = _read_index(loss_mask_prefix(prefix))
    if tokens.dtype not in _TOKEN_DTYPES:
        raise DataError(
            f"{prefix}.idx: found {np.dtype(tokens.dtype)} entries, expected token ids (uint16, int32); "
            f"{REMAKE}"
        )
    if mask.dtype is not np.uint8:
        raise DataError(
            f"{loss_mask_prefix(prefix)}.idx: found {np.dtype(mask.dtype)} entries, expected uint8 (0 or 1); "
            f"{REMAKE}"
        )
    if len(tokens.lengths) != len(mask.lengths):
        raise DataError(
            f"{loss_mask_prefix(prefix)}.idx: found {len(mask.lengths)} documents, expected "
            f"{len(tokens.lengths)} as in {prefix}.idx; {REMAKE}"
        )
    differing = np.flatnonzero(tokens.lengths != mask.lengths)
    if differing.size:
        document = int(differing[0])
        raise DataError(
            f"{loss_mask_prefix(prefix)}.idx: found {mask.lengths[document]} entries in document {document}, "
            f"expected {tokens.lengths[document]} as in {prefix}.idx; {REMAKE}"
        )
    if vocab_size is not None:
        largest, smallest = _extremes(Path(f"{prefix}.bin"), tokens.dtype)
        if largest >= vocab_size or smallest < 0:
            raise DataError(
                f"{prefix}.bin: found token id {largest if largest >= vocab_size else smallest}, expected "
                f"ids from 0 to {vocab_size - 1}; preprocess with the tokenizer of this model"
            )
    largest, _ = _extremes(Path(f"{loss_mask_prefix(prefix)}.bin"), mask.dtype)
    if largest > 1:
        raise DataError(
            f"{loss_mask_prefix(prefix)}.bin: found the value {largest}, expected 0 or 1; {REMAKE}"
        )


def fingerprint(prefix: str) -> str:
    """Return a digest by which a run recognises its data: equal for a copy of the four files elsewhere.

    The indices are read as a whole, and of each .bin its length and blocks that are spread over the file: a
    start must not read terabytes. So a few changed tokens of a large file may go unseen.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for stem in (prefix, loss_mask_prefix(prefix)):
            digest.update(Path(f"{stem}.idx").read_bytes())
            with Path(f"{stem}.bin").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for part in range(_DIGEST_BLOCKS):
                    file.seek(max(size - _DIGEST_BLOCK, 0) * part // (_DIGEST_BLOCKS - 1))
                    digest.update(file.read(_DIGEST_BLOCK))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _read_index(prefix: str) -> _Index:
    """Read PREFIX.idx and compare it with its own size and the size of PREFIX.bin.

    Raises:
        DataError: a file is missing, or they disagree.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"{path}: found no such file, expected one half of a .bin/.idx pair; {REMAKE}")
    size = idx_path.stat().st_size
    with idx_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise DataError(f"{idx_path}: found {header[:9]!r} at the start, expected {_MAGIC!r}; {REMAKE}")
    if len(header) < _HEADER.size:
        raise DataError(f"{idx_path}: found {size} bytes, expected a header of {_HEADER.size}; {REMAKE}")
    _, version, code, sequences, table = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{idx_path}: found version {version} and data type {code}, expected version 1 and a type from 1 "
            f"to 8; {REMAKE}"
        )
    expected = _HEADER.size + sequences * (4 + 8) + table * 8
    if size != expected:
        raise DataError(
            f"{idx_path}: found {size} bytes, expected {expected} for {sequences} documents; {REMAKE}"
        )
    dtype = _DTYPES[code]
    lengths = _entries(idx_path, np.int32, _HEADER.size, sequences)
    pointers = _entries(idx_path, np.int64, _HEADER.size + 4 * sequences, sequences)
    documents = _entries(idx_path, np.int64, _HEADER.size + 12 * sequences, table)
    if table != sequences + 1 or not np.array_equal(documents, np.arange(sequences + 1)):
        raise DataError(
            f"{idx_path}: found {sequences} sequences in {table - 1} documents, expected one sequence in "
            f"each; {REMAKE}"
        )
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    if (lengths < 0).any() or not np.array_equal(pointers, starts[:-1]):
        raise DataError(
            f"{idx_path}: found offsets that do not follow from the lengths, expected their sums; {REMAKE}"
        )
    if bin_path.stat().st_size != starts[-1]:
        raise DataError(
            f"{bin_path}: found {bin_path.stat().st_size} bytes, expected {starts[-1]} as {idx_path} says; "
            f"{REMAKE}"
        )
    return _Index(dtype, lengths)


def _entries(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    """Map `count` entries of `dtype` at byte `offset`; nothing is read."""
    if count == 0:  # numpy cannot map zero entries
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _extremes(path: Path, dtype: type) -> tuple[int, int]:
    """The (largest, smallest) entry among the first and the last million of a file."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    if count == 0:
        return 0, 0
    entries = _entries(path, dtype, 0, count)
    ends = (entries[:_SAMPLED_ENTRIES], entries[-_SAMPLED_ENTRIES:])
    return max(int(end.max()) for end in ends), min(int(end.min()) for end in ends)
