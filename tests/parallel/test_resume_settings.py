"""A resumed run equals one that was not stopped, bit for bit, with all settings of recipes and documents.

Settings that each have their part in saving and loading are paired: every two of them meet in one case.
"""

import itertools

import pytest

from tests.parallel.test_layouts import CP, FULL_RECOMPUTE, TP, VPP
from tests.parallel.test_resume import ZEROING, assert_resumes
from tests.support.retrofit import Workspace

DISTRIBUTED = ("--use-distributed-optimizer",)
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "distributed": DISTRIBUTED,
        "reshardable": (*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"),
        "undivided": (),
    },
    "save": {"sync": (), "async": ("--async-save",)},
    "recompute": {
        "none": (),
        "selective": ("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
        "full": FULL_RECOMPUTE,
    },
    "layout": {  # each divides the distributed optimizer's state in two
        "sp": (*TP, "--sequence-parallel"),
        "cp": CP,
        "vpp": VPP,
    },
    "precision": {"fp32": (), "bf16": ("--bf16", "--accumulate-allreduce-grads-in-fp32")},
    "train": {
        "all": ZEROING,
        "adapter": ("--dms-predictor", "linear", "--dms-train", "predictor", "--dms-teacher", "self"),
        "rows": ("--dms-train", "predictor", *ZEROING),
    },
}
CASES = [
    ("distributed", "sync", "none", "sp", "bf16", "adapter"),
    ("distributed", "async", "selective", "cp", "bf16", "all"),
    ("distributed", "sync", "full", "vpp", "fp32", "rows"),
    ("reshardable", "async", "full", "sp", "bf16", "all"),
    ("reshardable", "sync", "none", "cp", "bf16", "rows"),
    ("reshardable", "sync", "selective", "vpp", "fp32", "adapter"),
    ("undivided", "async", "none", "vpp", "bf16", "all"),
    ("undivided", "sync", "selective", "sp", "fp32", "rows"),
    ("undivided", "async", "full", "cp", "fp32", "adapter"),
    ("distributed", "async", "none", "vpp", "fp32", "rows"),
    ("undivided", "sync", "none", "cp", "fp32", "all"),
]


def test_every_two_settings_meet() -> None:
    """Catches: a case that is taken out, and a setting that is added to the table alone."""
    met = {pair for case in CASES for pair in itertools.combinations(zip(SETTINGS, case, strict=True), 2)}
    for (one, names), (other, others) in itertools.combinations(SETTINGS.items(), 2):
        for pair in itertools.product(((one, name) for name in names), ((other, name) for name in others)):
            assert pair in met, pair


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_resumed_equals_uninterrupted(case: tuple[str, ...], workspace: Workspace) -> None:
    """Catches: an optimizer that cannot load, counts of steps that all parameters share and raise in turn,
    fp32 masters made anew from bf16 weights, an asynchronous save of weights that have moved on."""
    flags = [flag for kind, name in zip(SETTINGS, case, strict=True) for flag in SETTINGS[kind][name]]
    flags += ["--seq-length", "56", "--micro-batch-size", "1", "--lr", "1e-3"]
    assert_resumes(workspace, "-".join(case), 2 if "cp" in case else 4, *flags)
