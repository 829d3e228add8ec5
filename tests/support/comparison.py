"""Compare the curves of two runs, and Megatron's validation loss with the loss that transformers computes."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from tests.support.retrofit import SEQUENCE, Workspace

COMPARED = (
    "loss",
    "KL",
    "compression loss",
    "achieved CR (soft)",
    "achieved CR (hard)",
    "CR of the least compressed layer",
    "CR of the most compressed layer",
    "grad-norm",
)
TOLERANCE = 1e-5  # relative, at every step; sums in another order differ by about 1e-6 after six Adam steps


def assert_same_curves(
    found: dict[str, list[float]], expected: dict[str, list[float]], steps: Iterable[int], tolerance: float
) -> None:
    """Assert that each compared scalar agrees at each step (from 0). tolerance: relative; 0 means bit for
    bit."""
    steps = list(steps)
    for name in COMPARED:
        assert len(found[name]) >= len(steps), f"{name} was logged {len(found[name])} times"
        for step, a in zip(steps, found[name][-len(steps) :], strict=True):
            b = expected[name][step]
            assert math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * 1e-2), (
                f"{name} at step {step}: {a} found, {b} expected"
            )


@torch.no_grad()
def cross_entropy(model: torch.nn.Module, workspace: Workspace) -> float:
    """Return the mean over the targets of two validation steps with four samples each, in nats."""
    from megatron_dms.data.dataset import ChatDataset

    samples = 8
    data = ChatDataset(str(workspace.data), SEQUENCE, samples, shuffle=False)
    total = targets = 0.0
    for sample in (data[index] for index in range(samples)):
        real = int(sample["valid"].sum())
        logits = model(sample["tokens"][None, :real]).logits[0]
        losses = F.cross_entropy(logits, sample["labels"][:real], reduction="none")
        total += float((losses * sample["loss_mask"][:real]).sum())
        targets += float(sample["loss_mask"].sum())
    return total / targets
