"""Building student and teacher: what happens to the model between its layer specs and Megatron's DDP."""

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
    """models: this rank's virtual stages, one without them; each gets the same stage of the teacher."""
    for student in models:
        set_rope(student, args.rope_parameters)
    if start is not None:
        start.load(models)
    if dms.train == "predictor":
        for student in models:
            freeze_all_but_predictor(student, dms)
    teacher_args = args if weights is None else _complete(args, weights.args)
    teachers = [_build_dense(teacher_args, dms, student) for student in models]
    if weights is not None:
        weights.load(teachers)
    pairs = list(zip(models, teachers, strict=True))
    if weights is None:
        for student, teacher in pairs:
            share_parameters(teacher, student)
    return [distill(student, teacher, dms, args.vocab_size) for student, teacher in pairs]


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
    if args.num_query_groups // args.tensor_model_parallel_size % args.context_parallel_size:
        config.transformer.cp_comm_type = "p2p"  # Transformer Engine's a2a shares no KV head among ranks
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    teacher = builder.build_model(groups, student.pre_process, student.post_process, student.vp_stage)
    set_rope(teacher, args.rope_parameters)
    return teacher
