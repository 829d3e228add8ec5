"""The zeroing of a borrowed channel in bfloat16, where the optimizer keeps its own weights."""

import torch

from megatron_dms.formats.megatron_folder import iteration_folder
from megatron_dms.formats.torch_dist import Reader
from tests.support.retrofit import Workspace

ZEROING = 2
GROUPS, QUERIES_PER_GROUP, HEAD_SIZE = 2, 2, 16
QKV = "decoder.layers.self_attention.linear_qkv.weight"


def test_masters_follow_the_zeroed_rows(workspace: Workspace) -> None:
    """With a learning rate of 1e-9 nothing moves, so the rows are still zero two steps after the zeroing.
    Catches fp32 master weights that are not reloaded: the first step would write the old rows back."""
    folder = workspace.folder / "bf16"
    flags = ("--bf16", "--lr", "1e-9", "--train-iters", str(2 * ZEROING), "--dms-zeroing-steps", str(ZEROING))
    workspace.run("bf16", 1, *flags, "--save", str(folder), "--save-interval", str(ZEROING))
    rows = [(group * (QUERIES_PER_GROUP + 2) + 1) * HEAD_SIZE - 1 for group in range(GROUPS)]
    before, after = (
        Reader(iteration_folder(folder, step)).tensor(QKV).float() for step in (ZEROING, 2 * ZEROING)
    )  # [layers, rows, hidden]
    assert before[:, rows].abs().max() > 0.1
    assert after[:, rows].abs().max() < 1e-6
    others = [row for row in range(before.shape[1]) if row not in rows]
    assert torch.equal(before[:, others], after[:, others])
