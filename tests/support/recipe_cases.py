"""The recipes of examples/ as the tests read them."""

import shlex
from functools import cache

import pytest
import recipe_pages
import torch
from recipes import MODELS, Recipe, read_env, read_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.launching import ROOT, TORCHRUN, launch

EXAMPLES = ROOT / "examples"


__all__ = ["MODELS", "Recipe", "read_env", "read_recipe", "recipe_pages"]
ROOM = 72e9
"""Bytes: what examples/README.md says of the layouts."""
RECIPES: dict[str, Recipe] = {
    f"{model.folder}/{name}": model.recipe(name) for model in MODELS for name in ("paper", "adapter")
}
every_recipe = pytest.mark.parametrize("name", RECIPES)


@cache
def hf_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of transformers' model of a recipe's config.json."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EXAMPLES / folder))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def launched(name: str) -> list[str]:
    """Return the flags that launch/torchrun.sh gives pretrain_dms.py, from its dry run."""
    hosts = ",".join(f"node{k}" for k in range(RECIPES[name].nodes))
    done = launch(ROOT, TORCHRUN, "--dry-run", "--hosts", hosts, EXAMPLES / f"{name}.env")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    return words[words.index(str(ROOT / "pretrain_dms.py")) + 1 :]
