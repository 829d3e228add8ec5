"""Building student and teacher: what happens to the model between its layer specs and Megatron's DDP."""

import copy
from argparse import Namespace
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args

from megatron_dms.checkpoint import set_model_args, set_rope
from megatron_dms.checkpoint.rope import attention_factor
from megatron_dms.checkpoint.training_args import ARCHITECTURE
from megatron_dms.config import DMSConfig
from megatron_dms.kernels import backend_name
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.training.teacher import distill, share_parameters
from megatron_dms.training.trainable import freeze_all_but_predictor
from megatron_dms.training.weights import Weights


def student_config(args: Namespace, dms: DMSConfig, start: Weights | None, teacher: Weights | None) -> Any:
    """Megatron's model configuration of the student, with its teacher attached before it is wrapped.

    start: what a new retrofit takes its weights from; None when one is resumed. teacher: its weights; None
    where it is the student itself.
    """
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = partial(dms_block_spec, dms=dms)
    # Teacher and student travel the pipeline side by side: wider tensors than Megatron expects.
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    config.pre_wrap_hooks.append(partial(_prepare, args=args, dms=dms, start=start, weights=teacher))
    return config


def _prepare(
    models: list[GPTModel], args: Namespace, dms: DMSConfig, start: Weights | None, weights: Weights | None
) -> list[GPTModel]:
    (student,) = models
    set_rope(student, args.rope_parameters)
    if start is not None:
        start.load(student)
    if dms.train == "predictor":
        freeze_all_but_predictor(student, dms)
    if weights is None:
        teacher = _build_dense(args, dms, student)
        share_parameters(teacher, student)
    else:
        teacher = _build_dense(_complete(args, weights.args), dms, student)
        weights.load(teacher)
    return [distill(student, teacher, dms, args.vocab_size)]


def _complete(args: Namespace, teacher: Namespace) -> Namespace:
    """The run's arguments with the teacher's architecture."""
    complete = copy.copy(args)
    for name in (*ARCHITECTURE, "max_position_embeddings"):
        if hasattr(teacher, name):
            setattr(complete, name, getattr(teacher, name))
    set_model_args(complete, teacher)
    if attention_factor(teacher.rope_parameters) != 1.0:
        complete.apply_rope_fusion = False  # the fused kernel has no such factor
    return complete


def _build_dense(args: Namespace, dms: DMSConfig, student: GPTModel) -> GPTModel:
    config = gpt_config_from_args(args)
    # With the dense back-end both make all scores in the same way: where nothing is evicted, the loss is 0
    # and not a rounding, which Adam would turn into steps of full length.
    device = next(student.parameters()).device
    score_matrix = backend_name(dms.attention_backend, device) == "dense"
    config.transformer_layer_spec = partial(dense_block_spec, score_matrix=score_matrix)
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    builder = config.get_builder_cls()(config)
    teacher = builder.build_model(
        ProcessGroupCollection.use_mpu_process_groups(), student.pre_process, student.post_process
    )
    set_rope(teacher, args.rope_parameters)
    return teacher
