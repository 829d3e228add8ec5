"""The training samples: documents cut into chunks, in an order that no layout of ranks changes.

A document of n tokens gives ceil((n − 1) / T) samples of T inputs and T labels (T = sequence length); the
label of the last input of one chunk is the first input of the next, so every token but a document's first is
predicted exactly once per epoch. A sample holds one document only: there is no attention across documents,
and padding stands at the end, where no real token attends to it.

Sample i of the run is entry i mod n of epoch i div n's permutation, which depends on seed and epoch only.
Megatron's MegatronPretrainingSampler (`--dataloader-type single`) hands microbatch m of data-parallel rank r
the ids `consumed + (m · DP + r) · micro_batch + [0, micro_batch)`, with `consumed` counted over the whole
run. So a global batch is the ids [consumed, consumed + global batch size) under every layout, and only the
order of summation differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split

from megatron_dms.data.data_flags import DataConfig, Source, data_config
from megatron_dms.data.token_files import TokenFile, check_pair, loss_mask_prefix
from megatron_dms.errors import DataError

__all__ = ["ChatDataset", "DataError", "build_datasets", "check_pair", "train_valid_test_datasets_provider"]


class ChatDataset(torch.utils.data.Dataset):
    """The samples of one split of a data set, in the order of the run.

    Args:
        prefix: path of the token files without ".bin" (see token_files).
        seq_length: T, tokens per sample.
        num_samples: number of samples to hand out, over as many epochs as it takes; None: one epoch.
        seed: seed of the permutations.
        shuffle: False keeps the order of the documents (validation, test).
        documents: (first, one past the last) document of the split; None: all.
        pad_token: token id of padding, in inputs and labels.
        vocab_size: number of token ids of the model; None leaves the ids unchecked.
        split: which split this is; Megatron's loader picks the batch size by it.

    Raises:
        DataError: the files do not fit each other, or the split holds no sample.
    """

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        num_samples: int | None = None,
        *,
        seed: int = 1234,
        shuffle: bool = True,
        documents: tuple[int, int] | None = None,
        pad_token: int = 0,
        vocab_size: int | None = None,
        split: Split = Split.train,
    ) -> None:
        if seq_length < 1:
            raise DataError(f"--seq-length: found {seq_length}, expected at least 1")
        check_pair(prefix, vocab_size)
        self.prefix = prefix
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self.pad_token = pad_token
        self.vocab_size = vocab_size
        self.split = split
        self.tokens, self.mask = TokenFile(prefix), TokenFile(loss_mask_prefix(prefix))
        lengths = self.tokens.lengths
        self.first_document, stop = documents if documents is not None else (0, len(lengths))
        targets = np.maximum(lengths[self.first_document : stop].astype(np.int64) - 1, 0)
        # first_sample[d] is the number of samples before document d of this split; [documents + 1]
        self.first_sample = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-targets // seq_length))])
        self.samples_per_epoch = int(self.first_sample[-1])
        if not self.samples_per_epoch:
            raise DataError(
                f"{prefix}: found no document of two tokens or more in documents {self.first_document} to "
                f"{stop} "
                f"({split.name}), expected some; use more data or another --split"
            )
        self.num_samples = self.samples_per_epoch if num_samples is None else num_samples
        # The last permutation is kept because drawing one costs O(samples): it is a cache, not state.
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def sample_of(self, index: int) -> int:
        """The number of the epoch's sample (in the order of the files) that is sample `index` of the run."""
        epoch, position = divmod(index, self.samples_per_epoch)
        if not self.shuffle:
            return position
        if epoch != self._epoch:
            # Raw Philox draws are sorted in place of numpy's permutation(): numpy promises that the stream
            # of a bit generator stays as it is, not what its methods make of the stream, and a resumed run
            # may have another numpy.
            generator = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            bits = generator.random_raw(self.samples_per_epoch)
            self._epoch, self._permutation = epoch, np.argsort(bits, kind="stable")
        return int(self._permutation[position])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Read sample `index` of the run.

        Returns:
            tokens [T] int64; labels [T] int64, the token after each; loss_mask [T] float32, 1 where the label
            counts; valid [T] bool, False on padding; position_ids [T] int64, from 0 in each chunk; sample_id
            [] int64, `index` itself.

        Raises:
            IndexError: the run has no such sample.
            DataError: a token id is beyond the vocabulary, or a file has changed or cannot be read.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"found sample {index}, expected 0 to {self.num_samples - 1}")
        sample = self.sample_of(int(index))
        document = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        begin = (sample - int(self.first_sample[document])) * self.seq_length
        document += self.first_document
        count = min(self.seq_length + 1, int(self.tokens.lengths[document]) - begin)
        ids = self.tokens.read(document, begin, count)  # [count]: `count − 1` inputs and the last label
        mask = self.mask.read(document, begin, count)
        if self.vocab_size is not None and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"{self.prefix}.bin: found token id {ids.max()} in document {document}, expected ids from 0 "
                f"to {self.vocab_size - 1}; preprocess with the tokenizer of this model"
            )
        real = count - 1
        tokens = torch.full((self.seq_length,), self.pad_token, dtype=torch.int64)
        labels = tokens.clone()
        loss_mask = torch.zeros(self.seq_length, dtype=torch.float32)
        tokens[:real] = torch.from_numpy(ids[:-1].astype(np.int64))
        labels[:real] = torch.from_numpy(ids[1:].astype(np.int64))
        loss_mask[:real] = torch.from_numpy(mask[1:].astype(np.float32))  # of the label, not of the input
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "valid": torch.arange(self.seq_length) < real,
            "position_ids": torch.arange(self.seq_length),
            "sample_id": torch.tensor(index, dtype=torch.int64),
        }


def build_datasets(config: DataConfig, num_samples: tuple[int | None, ...]) -> list[ChatDataset | None]:
    """Build the datasets of train, valid and test; None for a split without data or samples to hand out.

    Args:
        num_samples: number of samples to hand out of train, valid and test.

    Raises:
        DataError: see ChatDataset; or validation samples are wanted and there is no validation data.
    """
    datasets: list[ChatDataset | None] = []
    for split, source, wanted in zip(Split, config.sources, num_samples, strict=True):
        documents = _documents(source) if source is not None and wanted != 0 else None
        if source is None or documents is None:
            datasets.append(None)
            continue
        dataset = ChatDataset(
            source.prefix,
            config.seq_length,
            wanted,
            seed=config.seed,
            shuffle=split is Split.train,
            documents=documents,
            pad_token=config.pad_token,
            vocab_size=config.vocab_size,
            split=split,
        )
        datasets.append(dataset)
    train, valid, _ = datasets
    if train is None and num_samples[Split.train.value] != 0:
        raise DataError(
            "--split: found no document for training, expected some; use more data or another --split"
        )
    if valid is None and num_samples[Split.valid.value] != 0:
        # Megatron would start, train until the first validation, and fail there.
        raise DataError(
            "--eval-iters: found validation steps but no validation data, expected some; give "
            "--valid-data-path, or a --split with a larger second part, or set --eval-iters 0"
        )
    return datasets


def train_valid_test_datasets_provider(
    train_val_test_num_samples: tuple[int | None, ...], vp_stage: int | None = None
) -> list[ChatDataset | None]:
    """Build the datasets for megatron.training.pretrain; every virtual stage gets the same ones.

    Raises:
        DataError: see build_datasets.
    """
    del vp_stage
    from megatron.training import get_args, get_tokenizer  # needs seconds, and CUDA's stand-ins on a CPU

    args: Any = get_args()
    train, valid, test = train_val_test_num_samples
    # The length does not change the order, so it may be generous. It must be: Megatron's sampler stops with
    # an assertion once all samples are consumed, as when a finished run is started once more.
    return build_datasets(
        data_config(args, get_tokenizer()),
        (_beyond(train, args.consumed_train_samples), _beyond(valid, args.consumed_valid_samples), test),
    )


# Every rank builds the datasets and reads its own batches: all pipeline stages need the sample ids (for the
# noise) and the padding (for the compression loss), and nothing has to be broadcast.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _documents(source: Source) -> tuple[int, int] | None:
    """The (first, one past the last) document of a split; None if its part of the data is less than one."""
    first, stop = source.documents(len(TokenFile(source.prefix).lengths))
    return (first, stop) if stop > first else None


def _beyond(wanted: int | None, consumed: int) -> int | None:
    return wanted + consumed + 1 if wanted else wanted
