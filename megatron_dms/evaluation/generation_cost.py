"""What generating with an exported DMS model costs: for each prompt, in total, and by layer and KV head.

All figures come from `model.last_kv_stats` (KVStats in megatron_dms/hf/stats_dms.py), which describes one
batch. Reads and pairs are means over layers and KV heads; "dense" says what the same text costs with every
pair kept.

Shapes: L layers, G KV heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_dms.evaluation.progress import Progress
from megatron_dms.evaluation.statistics import compression_ratio, decisions
from megatron_dms.inference.generation import Sampling, answer_prompts, check_prompts, end_texts_only
from megatron_dms.text_table import RULE, text_table

PER_HEAD = ("evicted_fraction_per_head", "kv_reads_per_head", "peak_tokens_per_head")
_COLUMNS = (  # heading, name in the rows, format
    ("tokens", "prompt_tokens", "d"),
    ("generated", "generated_tokens", "d"),
    ("CR", "achieved_cr", ".2f"),
    ("KV reads", "kv_reads", ".1f"),
    ("dense", "dense_kv_reads", "d"),
    ("peak pairs", "peak_tokens", ".1f"),
    ("dense", "dense_peak_tokens", "d"),
    ("peak bytes", "peak_bytes", "d"),
    ("dense", "dense_bytes", "d"),
)
_HEAD_TABLES = (  # name, heading, format
    ("achieved_cr", "achieved CR", ".2f"),
    ("kv_reads", "KV reads, all sequences", ".1f"),
    ("peak_tokens", "peak live pairs, mean of the sequences", ".1f"),
)


@dataclass(frozen=True)
class Generation:
    """How answers are generated: one greedy answer, or several sampled ones."""

    max_new_tokens: int
    chains: int = 1
    """Number of answers to each prompt."""
    batch_size: int = 1
    """Number of prompts that are answered together, each with all its chains."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class PromptCost:
    """What one prompt costs with all its chains."""

    line: int
    """Line of the prompt in its file."""
    prompt_tokens: int
    generated_tokens: int
    evicted_fraction: float | None
    """Evicted share of all pairs. None if the prompt shared a batch: the share is known of whole batches."""
    kv_reads: float
    dense_kv_reads: int
    peak_tokens: float
    """Sum of the chains' peaks: all chains are held together until the last one ends."""
    dense_peak_tokens: int
    peak_bytes: int | None
    """Allocated for keys and values. None if the prompt shared a batch."""
    dense_bytes: int | None

    @property
    def achieved_cr(self) -> float | None:
        return compression_ratio(self.evicted_fraction)


@dataclass(frozen=True)
class BatchCost:
    """What one batch of prompts costs."""

    lines: list[int]
    prompt_tokens: list[int]
    chains: int
    lag: int
    """The model's lag in tokens: the first `lag` tokens of a sequence carry no decision."""
    stats: dict[str, Any]
    """KVStats as a dictionary; in its lists, the chains of a prompt follow each other."""

    @property
    def sequences(self) -> int:
        return len(self.prompt_tokens) * self.chains

    @property
    def decided(self) -> int:
        """Number of decisions in each KV head."""
        return decisions(self.stats["tokens_seen"], self.lag)

    def costs(self) -> list[PromptCost]:
        """Return the cost of each prompt."""
        alone = len(self.prompt_tokens) == 1
        sums = {
            name: [
                sum(values[start : start + self.chains]) for start in range(0, self.sequences, self.chains)
            ]
            for name, values in self.stats.items()
            if name in ("generated_tokens", "kv_reads", "dense_kv_reads", "peak_tokens", "tokens_seen")
        }
        return [
            PromptCost(
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
    """Answer all prompts, and return the cost of each batch.

    Args:
        model: an exported DMS model.
        prompts: line number and token ids of each prompt.
        pad_id: any token id; padding is masked.
        say: gets a line of progress now and then.
        needed: figures that last_kv_stats must have; PER_HEAD for `per_head`.

    Raises:
        ValueError: a prompt with its answer is longer than the model's positions; a prompt has a token that
            the model lacks; the device is out of memory; a needed figure is missing, because an earlier
            version made the export.
    """
    check_prompts(model, [ids for _, ids in prompts], generation.max_new_tokens)
    end_texts_only(model)
    greedily = generation.chains == 1
    sampling = Sampling(0.0 if greedily else generation.temperature, generation.top_p)
    torch.manual_seed(generation.seed)
    progress = Progress(say, len(prompts), "prompts")
    found: list[BatchCost] = []
    for start in range(0, len(prompts), generation.batch_size):
        batch = prompts[start : start + generation.batch_size]
        ids = [ids for _, ids in batch]
        answer_prompts(model, ids, generation.chains, generation.max_new_tokens, sampling, pad_id)
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
        progress.reached(start + len(batch))
    return found


def totals(batches: Sequence[BatchCost]) -> dict[str, Any]:
    """Return the figures of all prompts together.

    Counts and reads are sums. Peaks are the largest ones: of a prompt for pairs, of a batch for bytes.
    """
    costs = [cost for batch in batches for cost in batch.costs()]
    fraction = _mean([batch.stats["evicted_fraction"] for batch in batches], [b.decided for b in batches])
    sums = ("prompt_tokens", "generated_tokens", "kv_reads", "dense_kv_reads")
    peaks = ("peak_tokens", "dense_peak_tokens")
    of_batches = ("peak_bytes", "peak_bookkeeping_bytes", "dense_bytes")
    return {
        "prompts": len(costs),
        "achieved_cr": compression_ratio(fraction),
        "evicted_fraction": fraction,
        **{name: sum(getattr(cost, name) for cost in costs) for name in sums},
        **{name: max(getattr(cost, name) for cost in costs) for name in peaks},
        **{name: max(batch.stats[name] for batch in batches) for name in of_batches},
    }


def per_head(batches: Sequence[BatchCost]) -> dict[str, list[list[Any]]]:
    """Return [L][G] tables: the CR over all pairs, the sum of KV reads, the mean peak of the sequences."""
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
    """Return the weighted mean over the first dimension; 0 if all weights are 0."""
    parts = (value * weight for value, weight in zip(values, weights, strict=True))
    return sum(parts) / max(sum(weights), 1)


def rows_as_json(batches: Sequence[BatchCost]) -> list[dict[str, Any]]:
    """Return the cost of each prompt as it goes into JSON."""
    return [asdict(cost) | {"achieved_cr": cost.achieved_cr} for batch in batches for cost in batch.costs()]


def cost_table(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> str:
    """Return a table with one line for each prompt and one line for all prompts.

    Args:
        rows: as `rows_as_json` returns them.
        total: as `totals` returns it.
    """
    head = ["line", *(heading for heading, _, _ in _COLUMNS)]
    lines = [_cells(str(row["line"]), row) for row in rows]
    return text_table([head, RULE, *lines, RULE, _cells("all", total)])


def _cells(label: str, row: Mapping[str, Any]) -> list[str]:
    return [label, *(_cell(row[name], form) for _, name, form in _COLUMNS)]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def head_tables(tables: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Return a table of layers and KV heads for each figure that `per_head` returns."""
    texts = []
    for name, heading, form in _HEAD_TABLES:
        heads = [f"head {head}" for head in range(len(tables[name][0]))]
        lines = [
            [str(layer), *(_cell(value, form) for value in row)] for layer, row in enumerate(tables[name])
        ]
        texts.append(f"{heading}\n" + text_table([["layer", *heads], *lines]))
    return "\n\n".join(texts)
