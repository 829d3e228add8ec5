"""Transformer Engine's layers against the local ones: the same spec and checkpoint give the same losses."""

from importlib.util import find_spec

import pytest
import torch

from tests.support.comparison import COMPARED
from tests.support.retrofit import STEPS, Workspace, make_base, make_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine_torch") is None, reason="no Transformer Engine"),
]

Curves = dict[str, list[float]]
BF16 = 2**-8  # relative; a result that went through roundings in another order differs by a few of them
TOLERANCE = dict.fromkeys(COMPARED, 4 * BF16)
# Decisions of a random model sit near their threshold, where a rounding turns single ones.
TOLERANCE |= {name: 16 * BF16 for name in COMPARED if "CR" in name or name == "compression loss"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("transformer_engine"))
    make_base(workspace)
    make_data(workspace)
    return workspace


def run(workspace: Workspace, implementation: str, predictor: str, precision: tuple[str, ...]) -> Curves:
    validation = (
        "--valid-data-path",
        str(workspace.data),
        "--eval-iters",
        "2",
        "--eval-interval",
        str(STEPS),
    )
    flags = ("--transformer-impl", implementation, "--dms-predictor", predictor, *precision, *validation)
    return workspace.run(f"{implementation}_{predictor}_{len(precision)}", 1, *flags)


@pytest.mark.parametrize("predictor", ["query_channel", "linear"])
def test_same_losses_in_bf16(predictor: str, workspace: Workspace) -> None:
    """Catches: a norm applied twice or not at all (Transformer Engine's is part of linear_qkv, and the linear
    predictor reads what comes before it), weights loaded under the wrong names, another epsilon,
    another RoPE, a teacher whose attention sees padding or the future."""
    ours = run(workspace, "local", predictor, ("--bf16",))
    theirs = run(workspace, "transformer_engine", predictor, ("--bf16",))
    for name, tolerance in TOLERANCE.items():
        largest = max(abs(value) for value in ours[name])
        assert theirs[name] == pytest.approx(ours[name], rel=tolerance, abs=tolerance * largest), name
    name = "LM loss validation"
    assert theirs[name] == pytest.approx(ours[name], rel=BF16)


def test_same_losses_in_fp32(workspace: Workspace) -> None:
    """Compares the first step, before decisions and Adam drift apart; products may be TF32 (2^-11).
    Catches what the roundings of bf16 could hide."""
    ours = run(workspace, "local", "query_channel", ())
    theirs = run(workspace, "transformer_engine", "query_channel", ())
    for name in ("loss", "KL", "grad-norm"):
        assert theirs[name][0] == pytest.approx(ours[name][0], rel=16 * 2**-11), name
