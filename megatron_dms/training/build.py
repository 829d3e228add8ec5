"""Building student and teacher: what happens to the model between its layer specs and Megatron's DDP."""

import copy
import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args

from megatron_dms.checkpoint import (
    CheckpointError,
    checkpoint_args,
    import_hf,
    megatron_args,
    set_model_args,
    set_rope,
)
from megatron_dms.checkpoint.megatron_folder import iteration_folder
from megatron_dms.checkpoint.training_args import ARCHITECTURE
from megatron_dms.config import DMSConfig
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.training.teacher import distill, share_parameters
from megatron_dms.training.trainable import freeze_all_but_predictor


def student_config(args: Namespace, dms: DMSConfig) -> Any:
    """Megatron's model configuration of the student, with its teacher attached before it is wrapped."""
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = partial(dms_block_spec, dms=dms)
    # Teacher and student travel the pipeline side by side: wider tensors than Megatron expects.
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    config.pre_wrap_hooks.append(partial(_prepare, args=args, dms=dms))
    return config


def _prepare(models: list[GPTModel], args: Namespace, dms: DMSConfig) -> list[GPTModel]:
    (student,) = models
    _apply_rope(student, args)
    if dms.train == "predictor":
        freeze_all_but_predictor(student, dms)
    if dms.teacher == "self":
        teacher = _build_dense(args, student)
        share_parameters(teacher, student)
    else:
        folder = _megatron_folder(dms.teacher, args)
        teacher = _build_dense(_complete(args, teacher_args(folder)), student)
        load_weights(teacher, iteration_folder(folder))
    return [distill(student, teacher, dms.kl, args.vocab_size)]


def teacher_args(folder: str | Path) -> Namespace:
    """Architecture of a teacher, from a HF folder or a Megatron checkpoint.

    Raises:
        CheckpointError: neither of the two, or a damaged one.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return Namespace(**megatron_args(json.loads((folder / "config.json").read_text())))
    if not folder.is_dir():
        raise CheckpointError(f"--dms-teacher {folder} does not exist; give a HF folder or a Megatron checkpoint")
    return checkpoint_args(folder)


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
    _apply_rope(teacher, args)
    return teacher


def _apply_rope(model: GPTModel, args: Namespace) -> None:
    set_rope(model, args.rope_parameters)


def _megatron_folder(teacher: str, args: Namespace) -> Path:
    """The teacher as a Megatron checkpoint; a HF folder is imported once, beside the run's own checkpoints."""
    folder = Path(teacher)
    if not (folder / "config.json").is_file():
        return folder
    if not args.save:
        raise CheckpointError("a HF folder as teacher is imported to <--save>/teacher; give --save DIR")
    imported = Path(args.save) / "teacher"
    if dist.get_rank() == 0 and not imported.exists():
        import_hf(folder, imported)
    dist.barrier()
    return imported


@torch.no_grad()
def load_weights(model: GPTModel, folder: Path) -> None:
    """Load a model's weights, and nothing else, from one iteration's folder of a torch_dist checkpoint."""
    metadata = {"dp_cp_group": ProcessGroupCollection.use_mpu_process_groups().dp_cp}
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}  # nested: the file's common state joins it
    model.load_state_dict(dist_checkpointing.load(wanted, str(folder))["model"])
