"""A whole evaluation: samples of every method at every budget. Then results.py makes table and report.

    OUT/settings.json, OUT/samples/   see samples.py
    OUT/results.json, ...             see results.py

Models are loaded one at a time: the plain one serves vanilla and all baselines, each DMS checkpoint its own
CR.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.budgets import Run
from megatron_dms.evaluation.samples import settle
from megatron_dms.evaluation.tasks import Task, load_task
from megatron_dms.inference.checkpoints import fingerprint, read_config, same_dtype
from megatron_dms.inference.loading import check_device, check_exported, load_model, load_tokenizer
from megatron_dms.inference.prompts import Prompt
from megatron_dms.provenance import made_by


@dataclass(frozen=True)
class TaskChoice:
    """Which problems."""

    name: str
    source: str | None
    """The dataset's file or folder; None for the hub, or for a task that is made."""
    limit: int | None
    options: Mapping[str, Any]
    """Of the task; see tasks/."""

    def load(self, tokenizer: Any) -> Task:
        return load_task(self.name, self.source, self.limit, tokenizer, **self.options)


@dataclass(frozen=True)
class Models:
    """Where the models of all methods are, and how they run."""

    plain: Path | None
    """A checkpoint as its makers publish it, for vanilla and the baselines."""
    dms: Mapping[float, Path]
    """Exported DMS checkpoints by the compression ratio that they are asked for."""
    dtype: str = "auto"
    device: str | None = None
    page_attention: str = "torch"

    @property
    def folders(self) -> dict[str, Path]:
        plain = {} if self.plain is None else {"model": self.plain}
        return plain | {f"dms {cr:g}": folder for cr, folder in sorted(self.dms.items())}

    def check(self, runs: Sequence[Run]) -> None:
        """
        Raises:
            ValueError: a run lacks its model, a model has no run, a folder is not what it should be.
        """
        for run in runs:
            if run.method == "dms" and run.budget.cr not in self.dms:
                raise ValueError(f"budget {run.budget} needs a checkpoint: --dms {run.budget.cr:g}=DIR")
            if run.method != "dms" and self.plain is None:
                raise ValueError(f"method {run.method} needs a plain checkpoint: --model DIR")
        if self.plain is not None and all(run.method == "dms" for run in runs):
            raise ValueError("--model has no effect: only dms runs, from its own checkpoints")
        for cr in self.dms:
            if not any(run.method == "dms" and run.budget.cr == cr for run in runs):
                raise ValueError(f"--dms {cr:g}=DIR has no effect: no budget has this CR")
        if self.page_attention != "torch" and not any(run.method in ("dms", "vanilla") for run in runs):
            raise ValueError(f"--page-attention {self.page_attention} has no effect on the baselines")
        for folder in self.dms.values():
            check_exported(folder)
            if read_config(folder).get("dms_disable_eviction"):
                raise ValueError(
                    f"{folder}: its eviction is switched off (dms_disable_eviction), its CR is 1"
                )


def generate(
    runs: Sequence[Run],
    choice: TaskChoice,
    models: Models,
    sampling: Any,
    batch_size: int,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Samples of all runs; of those in `out` only what is missing.

    Args:
        sampling: a generation.Sampling.
        say: gets lines of progress.

    Raises:
        ValueError: bad input. What shows in the models' files, the task and `out` is refused before anything
            is generated; whether a model can be loaded and takes texts this long, only when it is its turn.
    """
    from megatron_dms.evaluation.runner import Prompted, sample_runs

    models.check(runs)
    device = check_device(models.device, models.page_attention)
    models = replace(models, dtype=same_dtype(models.folders, models.dtype))
    tokenizers = {folder: load_tokenizer(folder) for folder in models.folders.values()}
    tokenizer = next(iter(tokenizers.values()))
    task = choice.load(tokenizer)
    problems = _same_prompts(choice.name, task, tokenizers)
    hashes = {folder: fingerprint(folder, say) for folder in tokenizers}
    marks = {name: [str(folder.resolve()), hashes[folder]] for name, folder in models.folders.items()}
    settings = {
        **_task_settings(choice),
        "problems": problems_mark(task),
        "prompts": _mark(problems),  # as token ids: a later call may name other checkpoints
        **marks,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else None,  # which has no effect then
        "batch_size": batch_size,
        "dtype": models.dtype,
        "device": device,
        "page_attention": models.page_attention,
    }
    settle(out, settings)
    loaded = _Loaded(models, device, say)
    ordered = sorted(runs, key=lambda run: (run.method == "dms", run.budget.cr if run.method == "dms" else 0))
    prompted = [Prompted(*pair) for pair in problems]
    maker = made_by(device)
    sample_runs(ordered, prompted, out, loaded.for_run, tokenizer, sampling, batch_size, maker, say)


class _Loaded:
    """The model that was needed last."""

    def __init__(self, models: Models, device: str, say: Callable[[str], None]) -> None:
        self.models, self.device, self.say = models, device, say
        self.folder: Path | None = None
        self.model: Any = None

    def for_run(self, run: Run) -> Any:
        """Ready for the run's method and budget."""
        from megatron_dms.inference.baselines import load_plain, make_policy

        models, dms = self.models, run.method == "dms"
        folder = models.dms[run.budget.cr] if dms else models.plain
        if folder != self.folder:
            self.say(f"loading {folder}" + (" and running its code" if dms else ""))
            self.model = None  # before the next one needs the memory
            if dms:
                self.model = load_model(folder, models.dtype, self.device, models.page_attention)
            else:
                self.model = load_plain(folder, models.dtype, self.device)
            self.folder = folder
        if not dms:
            self.model.policy = make_policy(run.method, run.budget.cr)
            self.model.page_attention = models.page_attention if run.method == "vanilla" else "torch"
        return self.model


def _task_settings(choice: TaskChoice) -> dict[str, Any]:
    return {
        "task": choice.name,
        "data": choice.source,
        "limit": choice.limit,
        "task_options": dict(choice.options),
    }


def _same_prompts(name: str, task: Task, tokenizers: Mapping[Path, Any]) -> list[tuple[str, list[int]]]:
    """Id and token ids of every problem.

    Raises:
        ValueError: two tokenizers give other ids, or take the same ids for other texts.
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


def problems_mark(task: Task) -> str:
    """Tells sets of problems apart: their number, and a hash of what is asked (not of the answers, so that a
    mended one can be graded by)."""
    return _mark([[problem.id, problem.content] for problem in task.problems])


def _mark(values: Sequence[Any]) -> str:
    return f"{len(values)}, sha256 {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
