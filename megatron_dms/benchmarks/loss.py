"""Distillation losses against nvidia-modelopt's, from logits and from hidden states, in one process.

Every candidate computes the sum over tokens of KL(teacher || student) and its gradients.

Shapes: N tokens, V columns of the vocabulary, E hidden size of student and teacher.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from types import SimpleNamespace

import torch
from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
from torch import Tensor
from torch.nn.functional import linear

from megatron_dms.benchmarks.measuring import (
    Candidate,
    Measured,
    Memory,
    Result,
    compare,
    device_name,
    dtype_name,
    ratio,
)
from megatron_dms.kernels.kl import distillation_kl
from megatron_dms.kernels.linear_kl import linear_kl
from megatron_dms.ops.losses import kl_teacher_student

DIRECTION = "teacher_student"
FIRST_STEPS = 2
"""Steps of a loop after which memory must no longer grow."""


Group = Callable[[int, int, int, torch.dtype, torch.device], tuple[dict[str, Candidate], int]]
"""From N, V, E, type and device to the candidates, and the bytes of gradients that exist without them."""


@dataclass(frozen=True, kw_only=True)
class LossResult(Result):
    """Time of forward and backward. The peak counts bytes beyond the inputs: the two tensors of logits, or
    hidden states and weights."""

    tokens: int
    columns: int
    hidden: int | None
    """None if the logits are given."""
    loss: str
    to_modelopt: float | None
    """Time divided by that of modelopt's loss in the same group."""
    peak_percent: float | None
    """The peak in % of one tensor of logits; with hidden states, the gradients of hidden states and weight
    are subtracted first."""
    steps: int
    """Steps of a loop that looks for growth of memory; 0: no loop was run."""
    growth_bytes: int | None
    """Bytes allocated after the loop, minus those after its first steps."""
    peak_growth_bytes: int | None
    """Peak of the loop, minus that of its first steps."""


def measure(
    tokens: int,
    columns: int,
    hidden: int,
    dtype: torch.dtype,
    repeats: int,
    steps: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[LossResult]:
    """Measure two groups of three losses: from given logits, and with the output projection.

    Raises:
        ValueError: a number is out of range.
    """
    if min(tokens, columns, hidden, repeats) < 1 or not (steps == 0 or steps > FIRST_STEPS):
        raise ValueError(
            f"expected tokens, columns, hidden size and repeats >= 1 and steps 0 or > {FIRST_STEPS}, found "
            f"{tokens}, {columns}, {hidden}, {repeats} and {steps}"
        )
    rows = []
    groups: tuple[tuple[int | None, Group], ...] = ((None, _of_logits), (hidden, _with_projection))
    for size, group in groups:
        say(f"{tokens} x {columns}" + (f", hidden size {size}" if size else "") + " ...")
        candidates, gradients = group(tokens, columns, hidden, dtype, device)
        found = compare(candidates, repeats, device)
        modelopt = next(iter(found.values()))
        for name, own in found.items():
            growth, peak_growth = None, None
            if steps and own.ms is not None:
                growth, peak_growth = _growth(candidates[name], steps, device)
            rows.append(
                LossResult(
                    *astuple(own),
                    device=device_name(device),
                    dtype=dtype_name(dtype),
                    tokens=tokens,
                    columns=columns,
                    hidden=size,
                    loss=name,
                    to_modelopt=ratio(own, modelopt),
                    peak_percent=_percent(own, gradients, tokens * columns * dtype.itemsize),
                    steps=steps,
                    growth_bytes=growth,
                    peak_growth_bytes=peak_growth,
                )
            )
    return rows


def _percent(own: Measured, gradients: int, logits: int) -> float | None:
    return None if own.peak_bytes is None else 100 * (own.peak_bytes - gradients) / logits


def _growth(candidate: Candidate, steps: int, device: torch.device) -> tuple[int, int]:
    with Memory(device) as memory:
        for step in range(steps):
            candidate.prepare()
            candidate.run()
            if step + 1 == FIRST_STEPS:
                alive, peak = memory.alive, memory.peak
        return memory.alive - alive, memory.peak - peak


def _losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the losses, modelopt's first: each maps two tensors of logits [N, V] to the KL of each token."""
    modelopt = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False))
    return {
        "modelopt": lambda student, teacher: modelopt(student[:, None], teacher[:, None])[0],
        "plain formula": kl_teacher_student,
        "distillation_kl": lambda student, teacher: distillation_kl(student, teacher, DIRECTION),
    }


def _of_logits(
    N: int, V: int, _: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Candidate], int]:
    """Return candidates that start from logits. No bytes of gradients would exist without them."""
    student, kept = (torch.randn(N, V, dtype=dtype, device=device) for _ in range(2))
    student.requires_grad_()
    teacher = torch.empty_like(kept)

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(student, teacher).sum(), student)

    # distillation_kl overwrites the teacher's logits.
    restore = partial(teacher.copy_, kept)
    return {name: Candidate(partial(run, loss), restore) for name, loss in _losses().items()}, 0


def _with_projection(
    N: int, V: int, E: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Candidate], int]:
    """Return candidates that start from hidden states, and the bytes of one set of gradients."""
    student, teacher, student_weight, teacher_weight = (
        E**-0.25 * torch.randn(rows, E, dtype=dtype, device=device) for rows in (N, N, V, V)
    )
    wanted = (student.requires_grad_(), student_weight.requires_grad_())

    def separate(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return loss(linear(student, student_weight), linear(teacher, teacher_weight)).sum()

    def fused() -> Tensor:
        ones = torch.ones(N, device=device)
        return linear_kl(student, student_weight, teacher, teacher_weight, ones, DIRECTION)[0]

    def run(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), wanted)

    losses = _losses()
    whole = {
        f"linear + {name}": partial(separate, losses[name]) for name in ("modelopt", "distillation_kl")
    } | {"linear_kl": fused}
    candidates = {name: Candidate(partial(run, loss)) for name, loss in whole.items()}
    return candidates, student.nbytes + student_weight.nbytes
