"""Student and teacher as one model, through nvidia-modelopt's distillation plug-in for Megatron.

modelopt runs the frozen teacher before the student in each forward pass, sends both activations through the
pipeline side by side, captures both logits on the last stage, and hides the teacher from checkpoints.
"""

from functools import partial
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.distill.plugins.megatron import DistillationConfig, adjust_distillation_model_for_mcore
from torch import Tensor
from torch.nn.modules.loss import _Loss

DistillationLoss = _Loss
"""The base class that modelopt asks of a criterion: called with both output layers' outputs."""
_LOGIT_LAYERS = ("output_layer", "output_layer")


def distillation_model(student: GPTModel, teacher: GPTModel, loss: DistillationLoss | None) -> GPTModel:
    """Turn the student into modelopt's DistillationModel with this teacher, in place.

    Args:
        loss: compares the student's logits with the teacher's on the last pipeline stage; None on the others.
    """
    criterion = {} if loss is None else {_LOGIT_LAYERS: loss}
    model = mtd.convert(
        student,
        mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion, "loss_balancer": None})],
    )
    settings = DistillationConfig(criterion=criterion, logit_layers=_LOGIT_LAYERS)
    adjust_distillation_model_for_mcore(model, settings)
    model.forward = partial(_forward, model)
    # Where the activations of the two are cut apart again on the next pipeline stage. modelopt learns this
    # number from a function that Megatron calls only if megatron.post_training is installed. With
    # variable_seq_lengths the stages exchange their tensor shapes, and this number is all that is missing.
    model.set_student_input_tensor_shape([(student.config.hidden_size,)])
    return model


def _forward(model: GPTModel, *args: Any, **kwargs: Any) -> Tensor:
    """Run teacher and student, as modelopt's own forward does.

    modelopt's asks the pipeline rank whether this is the last stage. With virtual stages, only one stage of
    the last rank is the last, and each stage knows which it is.
    """
    teacher = model.teacher_model.eval()
    with torch.no_grad():
        teacher_output = teacher(*args, **kwargs)
    model._lm_loss_call_count = 0  # modelopt tells the main loss from those of further tokens by this count
    with model.only_student_forward():
        student_output = type(model).forward(model, *args, **kwargs)
    return student_output if model.post_process else torch.cat([student_output, teacher_output], dim=-1)
