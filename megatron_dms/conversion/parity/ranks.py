"""Run the model of a Megatron checkpoint at a layout of ranks.

The ranks are processes of their own, on the CPU with gloo, which meet in a file (no port to collide on): the
caller's process stays free of Megatron and its global state, and a rank's memory is given back.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dms.conversion.families import Model
from megatron_dms.conversion.parity.outputs import Outputs
from megatron_dms.conversion.parity.prompts import Prompts
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.megatron_folder import open_checkpoint
from megatron_dms.layout_rules import first_inexact, model_divisions

_SEED = 1234


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel and pipeline-parallel size."""

    tp: int
    pp: int

    @property
    def name(self) -> str:
        return f"PP {self.pp}" if self.pp > 1 else f"TP {self.tp}"

    def obstacle(self, model: Model) -> str | None:
        """Why the model cannot be laid out so; None if it can."""
        sizes = (model.heads, model.groups, model.ffn, model.layers)
        wrong = first_inexact(model_divisions(*sizes, self.tp, self.pp))
        return wrong and f"{wrong.number} {wrong.what} cannot be divided among {wrong.by} ranks"


@dataclass(frozen=True)
class Task:
    """A checkpoint, and the prompts to run it on. iteration: None means the latest. rounded: Megatron's key
    -> type that its values are rounded to before the model runs (it still runs in fp32).
    """

    megatron_dir: Path
    iteration: int | None
    sets: Sequence[Prompts]
    rounded: Mapping[str, torch.dtype] = field(default_factory=dict)


def megatron_outputs(layout: Layout, tasks: Sequence[Task]) -> list[list[Outputs]]:
    """Return the outputs of every task's model on each of its sets of prompts.

    Raises CheckpointError if a rank fails; the others are ended then.
    """
    world = layout.tp * layout.pp
    # Else a line about the ranks that are ended comes before the error of the one that failed.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), layout, tuple(tasks), max(1, torch.get_num_threads() // world))
        try:
            torch.multiprocessing.spawn(_rank, arguments, nprocs=world, daemon=True)  # end with us
        except torch.multiprocessing.ProcessRaisedException as error:
            reason = str(error).strip().rpartition(f"{CheckpointError.__name__}: ")[2]
            raise CheckpointError(f"Megatron's model failed at {layout.name}: {reason}") from error
        except torch.multiprocessing.ProcessExitedException as error:
            raise CheckpointError(
                f"Megatron's model failed at {layout.name}: {error}; is there enough memory?"
            ) from error
        return [
            [_collect(Path(folder), world, f"{i}-{j}", prompts) for j, prompts in enumerate(task.sets)]
            for i, task in enumerate(tasks)
        ]


def _collect(folder: Path, world: int, name: str, prompts: Prompts) -> Outputs:
    """Put together what the ranks left in files. The last rank is in the last stage and has all logits."""
    parts = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)]
    logits = parts[-1]["logits"][..., : prompts.vocab]
    by_layer: dict[int, dict[int, Tensor]] = {}
    for part in parts:
        for layer, (heads, evict_BGT) in part["decisions"].items():
            by_layer.setdefault(layer, {}).update(zip(heads.tolist(), evict_BGT.unbind(1), strict=True))
    if not by_layer:
        return Outputs(logits)
    layers = [by_layer[layer] for layer in sorted(by_layer)]
    return Outputs(logits, torch.stack([torch.stack([h[g] for g in sorted(h)], dim=1) for h in layers]))


def _rank(rank: int, folder: Path, layout: Layout, tasks: tuple[Task, ...], threads: int) -> None:
    """Run every task in one process and write its outputs to files. An error becomes one line, which the
    caller repeats.
    """
    try:
        _run_tasks(rank, folder, layout, tasks, threads)
    except (Exception, CheckpointException) as error:  # DCP's is no Exception
        raise CheckpointError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _run_tasks(rank: int, folder: Path, layout: Layout, tasks: tuple[Task, ...], threads: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fp32 on the CPU everywhere; Megatron takes any GPU it sees
    warnings.filterwarnings("ignore")  # Megatron's, on what is not installed
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    from megatron_dms.upstream import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dms.conversion.parity.megatron_model import (
        build_model,
        load_weights,
        round_weights,
        run_model,
    )

    world = layout.tp * layout.pp
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    parallel_state.initialize_model_parallel(layout.tp, layout.pp)
    model_parallel_cuda_manual_seed(_SEED)
    for i, task in enumerate(tasks):
        reader, args = open_checkpoint(task.megatron_dir, task.iteration)
        network = build_model(args).eval()
        load_weights(network, reader.folder)
        round_weights(network, task.rounded)
        for j, prompts in enumerate(task.sets):
            with torch.no_grad():
                torch.save(run_model(network, prompts), folder / f"{i}-{j}-{rank}.pt")
    torch.distributed.destroy_process_group()
