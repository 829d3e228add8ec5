"""The flags of each recipe, on a tiny model: a resumed run equals one that was not stopped, bit for bit.

Recipes that differ in size alone are the same at this size, and run once.
"""

from pathlib import Path

import pytest

from examples.recipes import read_env
from tests.parallel.test_resume import HALF, assert_resumes
from tests.support.forking import ROOT
from tests.support.retrofit import STEPS, WINDOW, Workspace

TINY = {
    **{"--seq-length": 56, "--micro-batch-size": 1, "--global-batch-size": 4, "--train-iters": STEPS},
    **{"--save-interval": HALF, "--dms-window": WINDOW, "--dms-steps-per-cr": 1, "--lr": 1e-3},
}
PARALLEL = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
PLACES = ("--load-hf", "--load", "--save", "--train-data-path", "--tensorboard-dir")


def tiny(env: Path) -> tuple[str, ...]:
    """The flags of a recipe with the numbers of a tiny run, without its places."""
    words = read_env(env)["TRAIN_ARGS"].split()
    found = []
    for flag, value in zip(words, [*words[1:], "--"], strict=True):
        if not flag.startswith("--") or flag in PLACES or flag in TINY:
            continue
        if flag in PARALLEL:
            value = str(min(int(value), 2))
        if flag == "--dms-zeroing-steps":
            value = str(HALF)
        if flag == "--dms-teacher" and value != "self":
            continue
        found += [flag] if value.startswith("--") else [flag, value]
    return (*found, *(str(word) for pair in TINY.items() for word in pair))


RECIPES = {tiny(env): env for env in sorted(ROOT.glob("examples/*/*.env"))}


def test_there_is_a_recipe_of_each_kind() -> None:
    """Catches: recipes that are no longer found, or that all look the same."""
    assert {env.stem for env in RECIPES.values()} == {"adapter", "paper"} and len(RECIPES) > 4
    assert all("--use-distributed-optimizer" in flags for flags in RECIPES)


@pytest.mark.parametrize(
    "flags", RECIPES, ids=lambda flags: f"{RECIPES[flags].parent.name}-{RECIPES[flags].stem}"
)
def test_resumed_equals_uninterrupted(flags: tuple[str, ...], workspace: Workspace) -> None:
    """Catches: flags of a recipe that cannot be resumed together, as the distributed optimizer without
    Transformer Engine and Apex."""
    name = "-".join(RECIPES[flags].parts[-2:])
    processes = max(2, 2 ** sum(flag in PARALLEL for flag in flags))
    start = ("--load-hf", str(workspace.hf), "no--pretrained-checkpoint")
    teacher = () if "--dms-teacher" in flags else ("--dms-teacher", str(workspace.hf))
    assert_resumes(workspace, name, processes, *flags, *start, *teacher)
