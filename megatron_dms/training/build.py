"""Building student and teacher: what happens to the model between its layer specs and Megatron's DDP."""

import copy
import hashlib
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args

from megatron_dms.checkpoint import (
    CheckpointError,
    checkpoint_args,
    import_hf,
    set_model_args,
    set_rope,
)
from megatron_dms.checkpoint.families import read_model
from megatron_dms.checkpoint.hf_folder import HFFolder
from megatron_dms.checkpoint.megatron_folder import iteration_folder
from megatron_dms.checkpoint.training_args import ARCHITECTURE
from megatron_dms.config import DMSConfig
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.training.teacher import distill, share_parameters
from megatron_dms.training.trainable import freeze_all_but_predictor


def student_config(args: Namespace, dms: DMSConfig, start: Path | None) -> Any:
    """Megatron's model configuration of the student, with its teacher attached before it is wrapped.

    start: the Megatron checkpoint that a new retrofit takes its weights from; None when one is resumed.
    """
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = partial(dms_block_spec, dms=dms)
    # Teacher and student travel the pipeline side by side: wider tensors than Megatron expects.
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    config.pre_wrap_hooks.append(partial(_prepare, args=args, dms=dms, start=start))
    return config


def _prepare(models: list[GPTModel], args: Namespace, dms: DMSConfig, start: Path | None) -> list[GPTModel]:
    (student,) = models
    set_rope(student, args.rope_parameters)
    if start is not None:
        load_weights(student, start, args.ckpt_step)
    if dms.train == "predictor":
        freeze_all_but_predictor(student, dms)
    if dms.teacher == "self":
        teacher = _build_dense(args, student)
        share_parameters(teacher, student)
    else:
        folder = imported_teacher(dms.teacher, args.save)
        if dist.get_rank() == 0 and not folder.exists():
            import_hf(dms.teacher, folder)
        dist.barrier()
        teacher = _build_dense(_complete(args, teacher_args(folder)), student)
        load_weights(teacher, folder)
    return [distill(student, teacher, dms.kl, args.vocab_size)]


def teacher_args(folder: str | Path) -> Namespace:
    """Architecture of a teacher, from a HF folder or a Megatron checkpoint, its files checked.

    Raises:
        CheckpointError: neither of the two, or a damaged one.
    """
    folder = Path(folder)
    if _is_hf(folder):
        hf = HFFolder(folder)
        model = read_model(hf.config, hf.dms_metadata)
        return Namespace(**model.family.megatron_args(model), dms=model.dms)
    if not folder.is_dir():
        raise CheckpointError(
            f"--dms-teacher {folder} does not exist; give a HF folder or a Megatron checkpoint"
        )
    return checkpoint_args(folder)


def imported_teacher(teacher: str | Path, save: str | Path | None) -> Path:
    """Where a teacher's Megatron checkpoint is: itself, or for a HF folder the place of its import.

    The place is named by the HF files' paths, sizes and times, so that another teacher never takes the place
    of this one.

    Raises:
        CheckpointError: a HF folder, and nowhere to import it to.
    """
    folder = Path(teacher)
    if not _is_hf(folder):
        return folder
    if not save:
        raise CheckpointError(
            f"--dms-teacher {folder} is a HF folder, to be imported to <--save>/teacher-...; give --save DIR"
        )
    files = sorted([folder.resolve() / "config.json", *folder.resolve().glob("*.safetensors*")])
    marks = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Path(save) / f"teacher-{hashlib.sha256(repr(marks).encode()).hexdigest()[:12]}"


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _complete(args: Namespace, teacher: Namespace) -> Namespace:
    """The run's arguments with the teacher's architecture."""
    complete = copy.copy(args)
    for name in (*ARCHITECTURE, "max_position_embeddings"):
        if hasattr(teacher, name):
            setattr(complete, name, getattr(teacher, name))
    set_model_args(complete, teacher)
    return complete


def _build_dense(args: Namespace, student: GPTModel) -> GPTModel:
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = dense_block_spec
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    builder = config.get_builder_cls()(config)
    teacher = builder.build_model(
        ProcessGroupCollection.use_mpu_process_groups(), student.pre_process, student.post_process
    )
    set_rope(teacher, args.rope_parameters)
    return teacher


def load_weights(model: GPTModel, folder: Path, iteration: int | None = None) -> None:
    """Load a model's weights, and nothing else, from one iteration (the latest) of a torch_dist checkpoint.

    A new predictor, which the checkpoint does not hold, stays as it was initialised.

    Raises:
        KeyError: any other tensor is missing.
    """
    held = (getattr(checkpoint_args(folder, iteration), "dms", None) or {}).get("predictor")
    metadata = {"dp_cp_group": ProcessGroupCollection.use_mpu_process_groups().dp_cp}
    wanted = model.sharded_state_dict(metadata=metadata)
    fresh = {name for name in wanted if ".dms_predictor." in name and held != "linear"}
    for name in fresh:
        del wanted[name]
    # Nested, because what the file holds in common (its arguments) is added beside it.
    loaded = dist_checkpointing.load({"model": wanted}, str(iteration_folder(folder, iteration)))["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    wrong = [name for name in (*missing, *unexpected) if name not in fresh and "_extra_state" not in name]
    if wrong:
        raise KeyError(f"{folder}: {', '.join(wrong)} do not match the model")
