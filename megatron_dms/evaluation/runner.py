"""Generate the samples of an evaluation: every run answers every problem, batch after batch.

A call goes on where an earlier call stopped. A batch is a fixed group of problems with a random seed of its
own, so the answers do not depend on where an evaluation was interrupted. Models are loaded one at a time: the
plain model serves vanilla and the training-free methods, each DMS checkpoint serves its own CR.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_dms.evaluation.answer_text import opens_thoughts
from megatron_dms.evaluation.budgets import Run
from megatron_dms.evaluation.evaluation_run import EvaluationRun, Models
from megatron_dms.evaluation.progress import Progress
from megatron_dms.evaluation.samples import (
    Batch,
    Chain,
    Sample,
    SampleFile,
    compresses,
    note_maker,
    samples_path,
    settle,
)
from megatron_dms.evaluation.statistics import decisions
from megatron_dms.evaluation.tasks import Task
from megatron_dms.inference.baselines import load_plain, make_policy
from megatron_dms.inference.checkpoints import fingerprint, same_dtype
from megatron_dms.inference.generation import answer_prompts, check_prompts, end_texts_only, pad_id
from megatron_dms.inference.loading import check_device, load_model, load_tokenizer
from megatron_dms.inference.prompts import Prompt
from megatron_dms.provenance import made_by

_LOOP_REPEATS = 4
_LOOP_TOKENS = 32


@dataclass(frozen=True)
class Prompted:
    """A problem as the model gets it."""

    id: str
    ids: list[int]
    """Token ids of the prompt."""


@dataclass(frozen=True)
class PreparedRun:
    """An EvaluationRun whose files were checked and whose settings are on disk."""

    asked: EvaluationRun
    """Its dtype is resolved."""
    device: str
    tokenizer: Any
    """Any checkpoint's: all tokenizers are equal."""
    problems: Sequence[Prompted]
    maker: Mapping[str, str]
    """What generates the samples (see provenance.py)."""


def run_evaluation(asked: EvaluationRun, say: Callable[[str], None]) -> None:
    """Generate all samples that are missing in `asked.out`.

    Args:
        say: gets lines of progress.

    Raises:
        ValueError: bad input. Whatever the files of the models, the task and `asked.out` show is refused
            before anything is generated. Whether a model can be loaded and takes texts of this length shows
            only when that model is loaded. A run that was to compress and did not is refused as soon as that
            is known.
    """
    prepared = prepare(asked, say)
    models = _LoadedModel(prepared.asked.models, prepared.device, say)
    for run in sorted(
        asked.runs, key=lambda run: (run.method == "dms", run.budget.cr if run.method == "dms" else 0)
    ):
        _sample_run(prepared, run, models, say)


def prepare(asked: EvaluationRun, say: Callable[[str], None]) -> PreparedRun:
    """Check everything that can be checked without loading a model, and write the settings.

    Raises:
        ValueError: bad input, or `asked.out` holds samples with other settings.
    """
    asked.models.check(asked.runs)
    device = check_device(asked.models.device, asked.models.page_attention)
    dtype = same_dtype(asked.models.folders, asked.models.dtype)
    asked = replace(asked, models=replace(asked.models, dtype=dtype, device=device))
    tokenizers = {folder: load_tokenizer(folder) for folder in asked.models.folders.values()}
    tokenizer = next(iter(tokenizers.values()))
    task = asked.task.load(tokenizer)
    if task.notice:
        say(task.notice)
    prompts = _same_prompts(asked.task.name, task, tokenizers)
    hashes = {folder: fingerprint(folder, say) for folder in tokenizers}
    in_thoughts = bool(prompts) and opens_thoughts(tokenizer.decode(prompts[0][1][-32:]))
    settle(asked.out, asked.settings(task, prompts, hashes, in_thoughts))
    problems = [Prompted(*pair) for pair in prompts]
    return PreparedRun(asked, device, tokenizer, problems, made_by(device))


def _same_prompts(name: str, task: Task, tokenizers: Mapping[Path, Any]) -> list[tuple[str, list[int]]]:
    """Return the id and the token ids of every problem.

    Raises:
        ValueError: two tokenizers give different ids, or read different texts into the same ids.
    """
    found: list[list[tuple[str, list[int]]]] = []
    for folder, tokenizer in tokenizers.items():
        found.append([])
        for number, problem in enumerate(task.problems, 1):
            prompt = Prompt(f"{name}, problem {problem.id}", number, problem.content)
            found[-1].append((problem.id, prompt.encode(tokenizer)))
        first = next(iter(tokenizers))
        if found[-1] != found[0] or tokenizer.get_vocab() != tokenizers[first].get_vocab():
            raise ValueError(
                f"the tokenizers of {first} and {folder} differ: the models would not get the same prompts"
            )
    return found[0]


class _LoadedModel:
    """Keeps the model that was needed last."""

    def __init__(self, models: Models, device: str, say: Callable[[str], None]) -> None:
        self.models, self.device, self.say = models, device, say
        self.folder: Path | None = None
        self.model: Any = None

    def ready_for(self, run: Run) -> Any:
        """Return the model, set to the method and the budget of the run."""
        models, dms = self.models, run.method == "dms"
        folder = models.folder_for(run)
        if folder != self.folder:
            self.say(f"loading {folder}" + (" and running its code" if dms else ""))
            self.model = None  # frees its memory before the next model needs it
            if dms:
                self.model = load_model(folder, models.dtype, self.device, models.page_attention)
            else:
                self.model = load_plain(folder, models.dtype, self.device)
            self.folder = folder
        if not dms:
            self.model.policy = make_policy(run.method, run.budget.cr)
            self.model.page_attention = models.page_attention if run.method == "vanilla" else "torch"
        return self.model


def _sample_run(prepared: PreparedRun, run: Run, models: _LoadedModel, say: Callable[[str], None]) -> None:
    """Generate the samples that one run lacks.

    Raises:
        ValueError: the run was to compress and did not; the samples in the folder are of other problems; and
            as `check_prompts` and `answer_prompts`.
    """
    problems = prepared.problems
    file = SampleFile(samples_path(prepared.asked.out, run))
    done = len(file.samples)
    if [sample.id for sample in file.samples] != [problem.id for problem in problems[:done]]:
        raise ValueError(f"{file.path} has samples of other problems: choose another --out")
    if done < len(problems):
        say(f"{run}: {done} of {len(problems)} problems are there" if done else f"{run}")
        _sample_batches(prepared, run, file, models.ready_for(run), say)
    refuse_without_effect(run, file.samples, complete=True)


def _sample_batches(
    prepared: PreparedRun, run: Run, file: SampleFile, model: Any, say: Callable[[str], None]
) -> None:
    """Generate the batches that the file lacks, and append each of them as soon as it is complete."""
    asked, problems, budget = prepared.asked, prepared.problems, run.budget
    check_prompts(model, [problem.ids for problem in problems], budget.length)
    end_texts_only(model)
    pad, done = pad_id(prepared.tokenizer), len(file.samples)
    progress = Progress(say, len(problems), "problems", done, prefix=f"{run}: ")
    for first in range(done, len(problems), asked.batch_size):
        batch = problems[first : first + asked.batch_size]
        torch.manual_seed(_seed(run.seed, batch))
        begin = time.monotonic()
        ids = [problem.ids for problem in batch]
        said = answer_prompts(model, ids, budget.chains, budget.length, asked.sampling, pad)
        seconds = time.monotonic() - begin
        chains = _chains(said.tolist(), model, prepared.tokenizer)
        whole = _batch(first // asked.batch_size, len(batch), seconds, model)
        note_maker(asked.out, prepared.maker)  # before the samples, so that each sample has its maker
        W = budget.chains
        file.append(Sample(problem.id, chains[i * W : (i + 1) * W], whole) for i, problem in enumerate(batch))
        refuse_without_effect(run, file.samples, complete=False)
        progress.reached(len(file.samples))


def _chains(said: list[list[int]], model: Any, tokenizer: Any) -> list[Chain]:
    """Return every chain of the batch that `model` has just answered, in the order of `said`.

    Args:
        said: token ids of each chain, padded after the end of a text.
    """
    stats = model.last_kv_stats
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    chains = []
    for row, tokens in enumerate(said):
        tokens = tokens[: stats.generated_tokens[row]]
        ended = tokens[-1] in ends
        chains.append(
            Chain(
                # Many tokenizers would take spaces before punctuation away, those of programs too.
                text=tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                tokens=len(tokens),
                ended=ended,
                loops=not ended and loops(tokens),
                kv_reads=stats.kv_reads[row],
                dense_kv_reads=stats.dense_kv_reads[row],
                peak_tokens=stats.peak_tokens[row],
            )
        )
    return chains


def _batch(index: int, problems: int, seconds: float, model: Any) -> Batch:
    """Return the figures of the batch that `model` has just answered."""
    stats = model.last_kv_stats
    return Batch(
        index=index,
        problems=problems,
        seconds=seconds,
        evicted_fraction=stats.evicted_fraction,
        decided=decisions(stats.tokens_seen, model.dms_settings.lag),
        peak_bytes=stats.peak_bytes,
    )


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text ends in a repetition: a block that comes 4 times or more, over at least 32 tokens."""
    for period in range(1, len(tokens) // _LOOP_REPEATS + 1):
        span = max(_LOOP_REPEATS * period, _LOOP_TOKENS)
        compared = range(1, span - period + 1)  # from the end
        if span <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in compared):
            return True
    return False


def refuse_without_effect(run: Run, samples: Sequence[Sample], complete: bool) -> None:
    """Refuse a run that was to compress and kept and read every pair.

    Args:
        complete: whether these are all samples of the run. A model that decides by itself shows at once
            whether it compresses; a method with a fixed budget shows it only when all its samples are there.

    Raises:
        ValueError: the run did not compress.
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
    """Return the random seed of a batch: a function of the seed and the batch's problems, and of nothing
    else, so that all methods use the same one."""
    text = "\0".join([str(seed), *(problem.id for problem in batch)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
