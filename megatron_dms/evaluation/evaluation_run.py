"""What an evaluation is asked for: the problems, the models, and the methods and budgets that are compared.

runner.py generates the samples of an EvaluationRun, results.py grades them. Imports nothing heavy.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dms.evaluation.budgets import Run
from megatron_dms.evaluation.tasks import EXECUTING, Task, load_task
from megatron_dms.inference.checkpoints import read_config
from megatron_dms.inference.loading import check_exported

if TYPE_CHECKING:
    from megatron_dms.inference.generation import Sampling


IN_THOUGHTS = "texts_begin_in_thoughts"
"""The setting that says whether the chat template opened the thoughts of every text."""


def without_sandbox(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task whose programs are to run as this user.

    Raises:
        ValueError: the task executes no programs.
    """
    if name not in EXECUTING:
        raise ValueError(f"--no-sandbox has no effect: task {name} executes no programs")
    return {**options, "sandbox": "none"}


@dataclass(frozen=True)
class TaskChoice:
    """Which problems are asked."""

    name: str
    source: str | None
    """The file or folder of the dataset. None for the hub, and for tasks that generate their problems."""
    limit: int | None
    options: Mapping[str, Any]
    """Options of the task; see tasks/."""

    def load(self, tokenizer: Any) -> Task:
        """Read or generate the problems.

        Raises:
            ValueError: as `load_task`.
        """
        return load_task(self.name, self.source, self.limit, tokenizer, **self.options)

    @property
    def settings(self) -> dict[str, Any]:
        """The choice as settings.json keeps it."""
        return {
            "task": self.name,
            "data": self.source,
            "limit": self.limit,
            "task_options": dict(self.options),
        }


@dataclass(frozen=True)
class Models:
    """Where the checkpoints of all methods are, and how their models run."""

    plain: Path | None
    """A checkpoint as its makers publish it, for vanilla and for the training-free methods."""
    dms: Mapping[float, Path]
    """Exported DMS checkpoints by the compression ratio (CR) of the budgets that they serve."""
    dtype: str = "auto"
    device: str | None = None
    page_attention: str = "torch"

    @property
    def folders(self) -> dict[str, Path]:
        """All checkpoints, by their names in settings.json."""
        plain = {} if self.plain is None else {"model": self.plain}
        return plain | {f"dms {cr:g}": folder for cr, folder in sorted(self.dms.items())}

    def folder_for(self, run: Run) -> Path:
        """Return the checkpoint that a run needs.

        Raises:
            ValueError: that checkpoint was not named.
        """
        if run.method == "dms":
            if run.budget.cr not in self.dms:
                raise ValueError(f"budget {run.budget} needs a checkpoint: --dms {run.budget.cr:g}=DIR")
            return self.dms[run.budget.cr]
        if self.plain is None:
            raise ValueError(f"method {run.method} needs a plain checkpoint: --model DIR")
        return self.plain

    def check(self, runs: Sequence[Run]) -> None:
        """Compare the models with the runs, and look into the folders of the DMS checkpoints.

        Raises:
            ValueError: a run lacks its checkpoint, a checkpoint has no run, or a folder holds no DMS
                checkpoint with its eviction switched on.
        """
        for run in runs:
            self.folder_for(run)
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


@dataclass(frozen=True)
class EvaluationRun:
    """Everything that one evaluation is asked for; nothing of it has been loaded yet."""

    runs: Sequence[Run]
    """The methods at their budgets, with each seed."""
    task: TaskChoice
    models: Models
    sampling: "Sampling"
    batch_size: int
    """Number of problems that are answered together, each with all its chains."""
    out: Path
    """The folder for settings, samples and results."""

    def settings(
        self, task: Task, prompts: Sequence[Any], hashes: Mapping[Path, str], in_thoughts: bool = False
    ) -> dict[str, Any]:
        """What settings.json keeps of the evaluation; a later call that differs is refused (see samples.py).

        Args:
            task: the loaded task.
            prompts: id and token ids of every problem.
            hashes: a hash of the contents of each checkpoint folder.
            in_thoughts: whether the prompts end within thoughts, so that texts begin in them.
        """
        models, temperature = self.models, self.sampling.temperature
        return {
            **self.task.settings,
            "problems": problems_mark(task),
            "prompts": _mark(prompts),  # as token ids: a later call may name other checkpoints
            **{name: [str(folder.resolve()), hashes[folder]] for name, folder in models.folders.items()},
            IN_THOUGHTS: in_thoughts,
            "temperature": temperature,
            "top_p": self.sampling.top_p if temperature else None,  # it has no effect at temperature 0
            "batch_size": self.batch_size,
            "dtype": models.dtype,
            "device": models.device,
            "page_attention": models.page_attention,
        }


def problems_mark(task: Task) -> str:
    """Return a text that tells two sets of problems apart: their number and a hash of what is asked.

    The answers are not hashed, so that samples can be graded again after an answer was corrected.
    """
    return _mark([[problem.id, problem.content] for problem in task.problems])


def _mark(values: Sequence[Any]) -> str:
    return f"{len(values)}, sha256 {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
