"""Megatron's data flags → DataConfig. They are read here only; flags that would do nothing are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from megatron_dms.data.token_files import check_pair
from megatron_dms.errors import DataError

# (attribute, flag, why it is refused): flags of Megatron's own datasets that our dataset would silently
# ignore, and flags under which sample ids or the set of samples would depend on the layout.
_REFUSED = (
    ("data_args_path", "--data-args-path", "one data set per split; preprocess the files into one"),
    ("per_split_data_args_path", "--per-split-data-args-path", "use --train-data-path and --valid-data-path"),
    ("mock_data", "--mock-data", "there are no teacher traces in it; give --data-path"),
    ("sft", "--sft", "chats are handled by tools/preprocess_data.py; drop the flag"),
    ("fim_data", "--fim-data", "not implemented for chats; drop the flag"),
    ("reset_position_ids", "--reset-position-ids", "each sample holds one document; drop the flag"),
    ("reset_attention_mask", "--reset-attention-mask", "each sample holds one document; drop the flag"),
    ("eod_mask_loss", "--eod-mask-loss", "the loss mask comes with the data (--loss-on); drop the flag"),
    ("hybrid_context_parallel", "--hybrid-context-parallel", "it packs samples by rank; drop it"),
    ("full_validation", "--full-validation", "ranks would repeat different samples; set --eval-iters"),
    ("multiple_validation_sets", "--multiple-validation-sets", "it needs --full-validation; drop the flag"),
    ("phase_transition_iterations", "--phase-transition-iterations", "sample ids would start over; drop it"),
)
_MEGATRONS_SPLIT = "969, 30, 1"  # the value that Megatron's checks set if --split is left out


@dataclass(frozen=True)
class Source:
    """The token files and the part of them that one split comes from."""

    prefix: str
    """Path of the token files without ".bin"."""
    begin: float = 0.0
    """Fraction of the documents before the split."""
    end: float = 1.0
    """Fraction of the documents before the end of the split."""

    def documents(self, total: int) -> tuple[int, int]:
        """The (first, one past the last) document of the split, out of `total` documents."""
        return round(self.begin * total), round(self.end * total)


Sources = tuple[Source | None, Source | None, Source | None]
"""The sources of train, valid and test; None: no such split."""


@dataclass(frozen=True)
class DataConfig:
    """Everything that the datasets need to know."""

    sources: Sources
    seq_length: int
    """Tokens per sample."""
    seed: int
    """Seed of the order of the training samples."""
    pad_token: int = 0
    """Token id of padding; 0 if the tokenizer has none (padding is never attended to and never a target)."""
    vocab_size: int | None = None
    """Number of token ids of the tokenizer; None leaves the ids unchecked."""


def data_config(args: Any, tokenizer: Any = None) -> DataConfig:
    """Read Megatron's arguments.

    Args:
        args: Megatron's namespace, before or after its own validation.
        tokenizer: Megatron's tokenizer; None if it is not built yet.

    Raises:
        DataError: a flag is refused, no data is named, or --split is not three numbers.
    """
    if args.dataloader_type not in (None, "single"):
        raise DataError(
            f"--dataloader-type: found {args.dataloader_type}, expected single, the only one that keeps the "
            "order of samples under every layout; drop the flag"
        )
    for attribute, flag, reason in _REFUSED:
        if getattr(args, attribute, None):
            raise DataError(f"{flag}: found it set, expected it unset: {reason}")
    own = [
        _single(f"--{name}-data-path", getattr(args, f"{name}_data_path"))
        for name in ("train", "valid", "test")
    ]
    shared = _single("--data-path", args.data_path)
    if shared is not None and any(own):
        raise DataError(
            "--data-path: found it beside --train-data-path and its like, expected one way; drop one"
        )
    if shared is None and not own[0]:
        raise DataError(
            "--data-path: found no training data, expected --data-path PREFIX or --train-data-path PREFIX"
        )
    if shared is not None:
        sources = _split_sources(shared, args.split or _MEGATRONS_SPLIT)
    else:
        if args.split is not None:
            raise DataError(
                f"--split: found {args.split} beside --train-data-path, expected it with --data-path only; "
                "drop it"
            )
        train, valid, test = (Source(prefix) if prefix else None for prefix in own)
        sources = train, valid, test
    pad = getattr(tokenizer, "pad", None)
    return DataConfig(
        sources=sources,
        seq_length=args.seq_length,
        seed=args.seed,
        pad_token=pad if isinstance(pad, int) and pad >= 0 else 0,
        vocab_size=getattr(tokenizer, "vocab_size", None),
    )


def validate_data_args(args: Any) -> None:
    """Check flags and files without building anything, at the start of a run, before any process group.

    Args:
        args: Megatron's namespace; its vocab_size is the model's by now.

    Raises:
        DataError: see data_config and check_pair.
    """
    config = data_config(args)
    if args.eval_iters and config.sources[1] is None:
        raise DataError(
            f"--eval-iters: found {args.eval_iters} and no validation data; give --valid-data-path, or a "
            "--split with a larger second part, or set --eval-iters 0"
        )
    for prefix in sorted({source.prefix for source in config.sources if source is not None}):
        check_pair(prefix, args.vocab_size)


def _single(flag: str, value: str | Sequence[str] | None) -> str | None:
    """The only prefix in a flag that Megatron reads as a list (for blends); None if the flag is not set."""
    if not value:
        return None
    entries = value.split() if isinstance(value, str) else list(value)
    if len(entries) != 1:
        raise DataError(
            f"{flag}: found {len(entries)} entries ({' '.join(entries)}), expected one prefix, as blends are "
            "not implemented; preprocess all files into one (tools/preprocess_data.py --input FILE...)"
        )
    return entries[0]


def _split_sources(prefix: str, split: str) -> Sources:
    try:
        weights = [float(weight) for weight in split.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    if len(weights) != 3 or min(weights) < 0 or not weights[0] > 0 or not isfinite(total):
        raise DataError(
            f"--split: found {split}, expected up to three weights >= 0, the first > 0, such as 969,30,1"
        )
    ends = [sum(weights[: k + 1]) / total for k in range(3)]
    train, valid, test = (
        Source(prefix, begin, end) if end > begin else None
        for begin, end in zip([0.0, *ends[:-1]], ends, strict=True)
    )
    return train, valid, test
