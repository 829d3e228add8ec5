"""Training = inference: Megatron's validation loss is the loss of the exported model."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_dms.conversion import export_hf
from megatron_dms.inference.dmc_model import load_dmc
from tests.support.comparison import cross_entropy
from tests.support.retrofit import STEPS, Workspace

TOLERANCE = 1e-5  # relative, on the mean cross entropy in fp32

PREDICTORS = {
    "query_channel": ("--dms-lag", "1"),
    "key_channel": ("--dms-predictor", "key_channel", "--dms-granularity", "layer", "--dms-lag", "3"),
    # W starts at 0: with this offset and learning rate it evicts after a few steps.
    "merging": ("--dms-method", "merge", "--dms-predictor", "key_channel", "--dms-window", "0"),
    "linear": ("--dms-predictor", "linear", "--dms-lag", "0", "--dms-alpha-offset", "0.05", "--lr", "3e-3"),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_exported_model_has_the_loss_that_megatron_validated(
    name: str, workspace: Workspace, tmp_path: Path
) -> None:
    """Retrofit, validate with hard decisions, export, load with transformers alone, and compute the same
    cross entropy. Catches settings or predictor weights that are lost on the way, a lag or window that
    Megatron and the exported model count differently, and a borrowed channel that only one of them
    zeroes."""
    save = ("--save", str(tmp_path / "run"), "--save-interval", str(STEPS))
    validation = (
        "--valid-data-path",
        str(workspace.data),
        "--eval-iters",
        "2",
        "--eval-interval",
        str(STEPS),
    )
    curves = workspace.run(f"export_{name}", 1, *save, *validation, *PREDICTORS[name])
    assert curves["achieved CR (hard) validation"][0] > 1.05, "nothing was evicted: nothing is compared"
    export_hf(tmp_path / "run", tmp_path / "hf")
    if name == "merging":
        model = load_dmc(tmp_path / "hf", "float32", "cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    found = cross_entropy(model, workspace)
    assert found == pytest.approx(curves["LM loss validation"][0], rel=TOLERANCE)
