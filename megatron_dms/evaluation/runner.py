"""Generate: every run's samples for every problem, batch after batch, going on where an earlier call stopped.

A batch is a fixed group of problems with a seed of its own, so that what is generated does not depend on
where an evaluation was interrupted.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dms.evaluation.budgets import Run
from megatron_dms.evaluation.samples import (
    Batch,
    Chain,
    Sample,
    SampleFile,
    compresses,
    note_maker,
    samples_path,
)
from megatron_dms.inference.generation import Sampling, check_prompts, end_texts_only, generate, pad_id

_SECONDS_BETWEEN_LINES = 10.0
_LOOP_REPEATS = 4
_LOOP_TOKENS = 32


@dataclass(frozen=True)
class Prompted:
    """A problem as the model gets it."""

    id: str
    ids: list[int]
    """Token ids of the prompt."""


def sample_runs(
    runs: Sequence[Run],
    problems: Sequence[Prompted],
    folder: Path,
    model_for: Callable[[Run], Any],
    tokenizer: Any,
    sampling: Sampling,
    batch_size: int,
    maker: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Generate what is missing.

    Args:
        model_for: gives the model of a run, ready for its method and compression ratio.
        batch_size: problems at a time, each with all its chains.
        maker: what generates, for the settings (see provenance.py).
        say: gets a line of progress now and then.

    Raises:
        ValueError: a run that was to compress did not; the samples in the folder are of other problems; and
            as generation.py.
    """
    for run in runs:
        file = SampleFile(samples_path(folder, run))
        ids = [problem.id for problem in problems]
        done = len(file.samples)
        if [sample.id for sample in file.samples] != ids[:done]:
            raise ValueError(f"{file.path} has samples of other problems: choose another --out")
        if done < len(problems):
            say(f"{run}: {done} of {len(problems)} problems are there" if done else f"{run}")
            note = partial(note_maker, folder, maker)
            _sample(run, problems, file, model_for(run), tokenizer, sampling, batch_size, note, say)
        refuse_without_effect(run, file.samples, complete=True)


def _sample(
    run: Run,
    problems: Sequence[Prompted],
    file: SampleFile,
    model: Any,
    tokenizer: Any,
    sampling: Sampling,
    batch_size: int,
    note: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    check_prompts(model, [problem.ids for problem in problems], run.budget.length)
    end_texts_only(model)
    begin = last = time.monotonic()
    start = len(file.samples)
    for first in range(start, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        torch.manual_seed(_seed(run.seed, batch))
        now = time.monotonic()
        ids, budget = [problem.ids for problem in batch], run.budget
        said = generate(model, ids, budget.chains, budget.length, sampling, pad_id(tokenizer))
        seconds = time.monotonic() - now
        note()  # before, so that no sample is without
        file.append(_samples(run, batch, first // batch_size, said.tolist(), model, tokenizer, seconds))
        refuse_without_effect(run, file.samples, complete=False)
        now, done = time.monotonic(), len(file.samples)
        if now - last >= _SECONDS_BETWEEN_LINES and done < len(problems):
            last = now
            left = (now - begin) * (len(problems) - done) / (done - start)
            say(f"{run}: {done} of {len(problems)} problems, about {left:.0f} s left")


def _samples(
    run: Run,
    batch: Sequence[Prompted],
    index: int,
    said: list[list[int]],
    model: Any,
    tokenizer: Any,
    seconds: float,
) -> list[Sample]:
    stats = model.last_kv_stats
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    chains = []
    for row, tokens in enumerate(said):
        tokens = tokens[: stats.generated_tokens[row]]
        ended = tokens[-1] in ends
        chains.append(
            Chain(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=len(tokens),
                ended=ended,
                loops=not ended and loops(tokens),
                kv_reads=stats.kv_reads[row],
                dense_kv_reads=stats.dense_kv_reads[row],
                peak_tokens=stats.peak_tokens[row],
            )
        )
    whole = Batch(
        index=index,
        problems=len(batch),
        seconds=seconds,
        evicted_fraction=stats.evicted_fraction,
        decided=sum(max(seen - model.dms_settings.lag, 0) for seen in stats.tokens_seen),
        peak_bytes=stats.peak_bytes,
    )
    W = run.budget.chains
    return [Sample(problem.id, chains[i * W : (i + 1) * W], whole) for i, problem in enumerate(batch)]


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text ends in repetition: some block, 4 times or more, over at least 32 tokens."""
    for period in range(1, len(tokens) // _LOOP_REPEATS + 1):
        span = max(_LOOP_REPEATS * period, _LOOP_TOKENS)
        compared = range(1, span - period + 1)  # from the end
        if span <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in compared):
            return True
    return False


def refuse_without_effect(run: Run, samples: Sequence[Sample], complete: bool) -> None:
    """
    Raises:
        ValueError: compression was asked for, and there is none: all pairs were kept and read. A model that
            decides by itself shows that at once, a method with a fixed budget only when all its samples are
            there.
    """
    if not samples or not (complete or run.method == "dms"):
        return
    if not compresses(run, samples):
        raise ValueError(
            f"{run}: the achieved CR is 1 where {run.budget.cr:g} was asked for: no pair was evicted, and "
            "every one was read. "
            + (
                "Is this a DMS checkpoint, and is its eviction switched on?"
                if run.method == "dms"
                else "The texts are shorter than what the budget keeps."
            )
        )


def _seed(seed: int, batch: Sequence[Prompted]) -> int:
    """A function of the seed and the batch's problems; the same for all methods."""
    text = "\0".join([str(seed), *(problem.id for problem in batch)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
