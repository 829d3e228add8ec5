"""What generating with an exported DMS model costs, by prompt, in all, and by layer and KV head.

All figures come from `model.last_kv_stats` (KVStats in megatron_dms/hf/stats_dms.py), one for each batch.
Reads and pairs are means over layers and KV heads; "dense" is the same text with every pair kept.

Shapes: L layers, G KV heads.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_dms.evaluation.statistics import compression_ratio
from megatron_dms.inference.generation import Sampling, check_prompts, end_texts_only, generate

PER_HEAD = ("evicted_fraction_per_head", "kv_reads_per_head", "peak_tokens_per_head")
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Generation:
    """How answers are generated: one greedily, or several by sampling."""

    max_new_tokens: int
    chains: int = 1
    """Answers to each prompt."""
    batch_size: int = 1
    """Prompts at a time, each with all its chains."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One prompt with all its chains."""

    line: int
    """Of the file of prompts."""
    prompt_tokens: int
    generated_tokens: int
    evicted_fraction: float | None
    """Of all pairs; None where the prompt shared a batch, for which alone it is known."""
    kv_reads: float
    dense_kv_reads: int
    peak_tokens: float
    """The chains' peaks add up: they are held together until the last one ends."""
    dense_peak_tokens: int
    peak_bytes: int | None
    """Allocated for keys and values; None as above."""
    dense_bytes: int | None

    @property
    def achieved_cr(self) -> float | None:
        return compression_ratio(self.evicted_fraction)


@dataclass(frozen=True)
class BatchCost:
    """One call of `generate`."""

    lines: list[int]
    prompt_tokens: list[int]
    chains: int
    lag: int
    """In tokens, the model's: a sequence's first `lag` tokens carry no decision."""
    stats: dict[str, Any]
    """KVStats as a dict; in its lists, the chains of a prompt follow each other."""

    @property
    def sequences(self) -> int:
        return len(self.prompt_tokens) * self.chains

    @property
    def decided(self) -> int:
        """Decisions in each head."""
        return sum(max(seen - self.lag, 0) for seen in self.stats["tokens_seen"])

    def rows(self) -> list[Row]:
        """One for each prompt."""
        alone = len(self.prompt_tokens) == 1
        sums = {
            name: [
                sum(values[start : start + self.chains]) for start in range(0, self.sequences, self.chains)
            ]
            for name, values in self.stats.items()
            if name in ("generated_tokens", "kv_reads", "dense_kv_reads", "peak_tokens", "tokens_seen")
        }
        return [
            Row(
                line=self.lines[i],
                prompt_tokens=self.prompt_tokens[i],
                generated_tokens=sums["generated_tokens"][i],
                evicted_fraction=self.stats["evicted_fraction"] if alone else None,
                kv_reads=sums["kv_reads"][i],
                dense_kv_reads=sums["dense_kv_reads"][i],
                peak_tokens=sums["peak_tokens"][i],
                dense_peak_tokens=sums["tokens_seen"][i],
                peak_bytes=self.stats["peak_bytes"] if alone else None,
                dense_bytes=self.stats["dense_bytes"] if alone else None,
            )
            for i in range(len(self.prompt_tokens))
        ]


def measure(
    model: Any,
    prompts: Sequence[tuple[int, list[int]]],
    generation: Generation,
    pad_id: int,
    say: Callable[[str], None],
    needed: Sequence[str] = (),
) -> list[BatchCost]:
    """Answer all prompts.

    Args:
        model: an exported DMS model.
        prompts: line and token ids of each.
        pad_id: any token id; padding is masked.
        say: gets a line of progress now and then.
        needed: figures that last_kv_stats must have; PER_HEAD for `per_head`.

    Raises:
        ValueError: a prompt with its answer is longer than the model's positions; a token that the model does
            not have; out of memory; a needed figure is missing, because the export is of an earlier version.
    """
    check_prompts(model, [ids for _, ids in prompts], generation.max_new_tokens)
    end_texts_only(model)
    greedily = generation.chains == 1
    sampling = Sampling(0.0 if greedily else generation.temperature, generation.top_p)
    torch.manual_seed(generation.seed)
    begin = last = time.monotonic()
    found: list[BatchCost] = []
    for start in range(0, len(prompts), generation.batch_size):
        batch = prompts[start : start + generation.batch_size]
        ids = [ids for _, ids in batch]
        generate(model, ids, generation.chains, generation.max_new_tokens, sampling, pad_id)
        stats = model.last_kv_stats.to_dict(per_head=True)
        missing = [name for name in needed if name not in stats]
        if missing:
            raise ValueError(f"last_kv_stats of this checkpoint lacks {missing[0]}: export it again")
        found.append(
            BatchCost(
                lines=[line for line, _ in batch],
                prompt_tokens=[len(ids) for _, ids in batch],
                chains=generation.chains,
                lag=model.dms_settings.lag,
                stats=stats,
            )
        )
        now, done = time.monotonic(), start + len(batch)
        if now - last >= _SECONDS_BETWEEN_LINES and done < len(prompts):
            last = now
            left = (now - begin) * (len(prompts) / done - 1)
            say(f"{done} of {len(prompts)} prompts, {now - begin:.0f} s, about {left:.0f} s left")
    return found


def totals(batches: Sequence[BatchCost]) -> dict[str, Any]:
    """Sums over all prompts; of peaks the largest, of a prompt in pairs and of a batch in bytes."""
    rows = [row for batch in batches for row in batch.rows()]
    fraction = _mean([batch.stats["evicted_fraction"] for batch in batches], [b.decided for b in batches])
    sums = ("prompt_tokens", "generated_tokens", "kv_reads", "dense_kv_reads")
    peaks = ("peak_tokens", "dense_peak_tokens")
    of_batches = ("peak_bytes", "peak_bookkeeping_bytes", "dense_bytes")
    return {
        "prompts": len(rows),
        "achieved_cr": compression_ratio(fraction),
        "evicted_fraction": fraction,
        **{name: sum(getattr(row, name) for row in rows) for name in sums},
        **{name: max(getattr(row, name) for row in rows) for name in peaks},
        **{name: max(batch.stats[name] for batch in batches) for name in of_batches},
    }


def per_head(batches: Sequence[BatchCost]) -> dict[str, list[list[Any]]]:
    """[L][G] tables: the CR over all pairs, KV reads of all sequences, peak pairs as their mean."""
    evicted, reads, peaks = (
        torch.tensor([batch.stats[name] for batch in batches], dtype=torch.float64) for name in PER_HEAD
    )
    decided = [batch.decided for batch in batches]
    sequences = [batch.sequences for batch in batches]
    fraction_LG = _mean(evicted, decided)
    return {
        "achieved_cr": [[compression_ratio(x) for x in row] for row in fraction_LG.tolist()],
        "kv_reads": (_mean(reads, sequences) * sum(sequences)).tolist(),
        "peak_tokens": _mean(peaks, sequences).tolist(),
    }


def _mean(values: Any, weights: list[int]) -> Any:
    """Over the first dimension; 0 where there is nothing to weigh."""
    parts = (value * weight for value, weight in zip(values, weights, strict=True))
    return sum(parts) / max(sum(weights), 1)


def rows_as_json(batches: Sequence[BatchCost]) -> list[dict[str, Any]]:
    return [asdict(row) | {"achieved_cr": row.achieved_cr} for batch in batches for row in batch.rows()]
