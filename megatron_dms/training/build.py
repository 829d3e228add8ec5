"""Build the student and the teacher: everything between the layer specs and Megatron's DDP."""

import copy
from argparse import Namespace
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args

from megatron_dms.config import DMSConfig
from megatron_dms.conversion import set_model_args, set_rope
from megatron_dms.conversion.rope import attention_factor
from megatron_dms.conversion.training_args import ARCHITECTURE
from megatron_dms.kernels import backend_name
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.training.startup import Run
from megatron_dms.training.teacher import distill, share_parameters
from megatron_dms.training.trainable import freeze_all_but_predictor


def student_config(run: Run) -> Any:
    """Return Megatron's model configuration of the student. A hook in it attaches the teacher before Megatron
    wraps the model."""
    config = gpt_config_from_args(run.args)
    config.transformer_layer_spec = partial(dms_block_spec, dms=run.dms)
    # The activations of teacher and student travel the pipeline side by side: Megatron expects narrower
    # tensors.
    config.transformer.variable_seq_lengths = run.args.pipeline_model_parallel_size > 1
    config.pre_wrap_hooks.append(partial(_load_and_attach_teacher, run=run))
    return config


def _load_and_attach_teacher(models: list[GPTModel], run: Run) -> list[GPTModel]:
    """Load the student's weights, build its teacher, and make one model of the two.

    Args:
        models: this rank's virtual pipeline stages, or its one stage. Each gets the same stage of the
            teacher.
    """
    args, dms, weights = run.args, run.dms, run.teacher
    for student in models:
        set_rope(student, args.rope_parameters)
    if run.new_start is not None:
        run.new_start.load(models)
    if dms.train == "predictor":
        for student in models:
            freeze_all_but_predictor(student, dms)
    teacher_args = args if weights is None else _with_architecture_of(weights.args, args)
    teachers = [_build_dense(teacher_args, dms, student) for student in models]
    if weights is not None:
        weights.load(teachers)
    pairs = list(zip(models, teachers, strict=True))
    if weights is None:
        for student, teacher in pairs:
            share_parameters(teacher, student)
    return [distill(student, teacher, dms, args.vocab_size) for student, teacher in pairs]


def _with_architecture_of(teacher: Namespace, args: Namespace) -> Namespace:
    """Return the run's arguments `args` with the teacher's architecture."""
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
    # With the dense back-end, teacher and student compute their scores in the same way. So the loss is
    # exactly 0 as long as nothing is evicted. Adam would turn a rounding error into steps of full length.
    device = next(student.parameters()).device
    score_matrix = backend_name(dms.attention_backend, device) == "dense"
    config.transformer_layer_spec = partial(dense_block_spec, score_matrix=score_matrix)
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    if args.num_query_groups // args.tensor_model_parallel_size % args.context_parallel_size:
        # Transformer Engine's a2a cannot share a KV head between ranks.
        config.transformer.cp_comm_type = "p2p"
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    teacher = builder.build_model(groups, student.pre_process, student.post_process, student.vp_stage)
    set_rope(teacher, args.rope_parameters)
    return teacher
