"""The recipes of examples/: layouts, sizes, env files, pages and the commands on them."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.models import of_folder, preset
from megatron_dms.planning.search import find_layouts
from tests.support.launching import ROOT, SBATCH, launch
from tests.support.recipe_cases import (
    EXAMPLES,
    MODELS,
    RECIPES,
    ROOM,
    every_recipe,
    hf_shapes,
    launched,
    read_env,
    read_recipe,
    recipe_pages,
)
from tests.support.tools import run_tool


def test_one_node_holds_32k_tokens_of_qwen3_8b() -> None:
    """Checks the claim by the planner's account."""
    recipe = RECIPES["qwen3-8b/adapter"]
    assert recipe.nodes == 1 and recipe.setting.context == 32768 and recipe.layout.cp == 1
    assert recipe.layout.ranks == 8 and recipe.plan.memory.total < 80e9


@every_recipe
def test_layouts_are_the_planners(name: str) -> None:
    """Each layout is within 5 % of the fastest that fits without context parallelism. Context parallelism
    is left to those who have tried it. Catches: a layout from before a change."""
    recipe = RECIPES[name]
    room = replace(DEVICES["h100"], memory=ROOM)
    found = find_layouts(recipe.setting, recipe.layout.ranks, room, Assumptions(), {"cp": 1})
    best = found.plans[0]
    assert recipe.plan.seconds <= 1.05 * best.seconds, best.layout


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_sizes_stand_once(model) -> None:
    """config.json, the planner's preset, and transformers' class agree.

    Catches: a number mistyped in either of the first two.
    """
    size = preset(model.preset)
    read = of_folder(EXAMPLES / model.folder)
    assert read == replace(size, name=model.folder, context=None, batch=None)
    assert sum(map(prod, hf_shapes(model.folder).values())) == size.parameters()


@every_recipe
def test_env_files_are_what_the_launcher_takes(name: str) -> None:
    """Catches: a mistake in an env file, and one read in another way by the pages and by the launcher."""
    env = EXAMPLES / f"{name}.env"
    done = launch(ROOT, SBATCH, "--dry-run", env)
    assert done.returncode == 0, done.stderr
    read = read_env(env)
    assert launched(name)[:-3] == read["TRAIN_ARGS"].split()  # less --exit-signal-handler and the like
    assert (
        f" --nodes={read['NODES']} " in done.stdout
        and f"--gpus-per-node={read['GPUS_PER_NODE']}" in done.stdout
    )


def test_an_env_file_of_another_recipe_is_refused(tmp_path: Path) -> None:
    source = EXAMPLES / "qwen3-8b" / "paper.env"
    (tmp_path / "adapter.env").write_text(source.read_text())
    with pytest.raises(ValueError, match="flags of another recipe, expected those of adapter"):
        read_recipe(tmp_path / "adapter.env", MODELS[-1])


def test_pages_are_todays() -> None:
    """Catches: a figure that is no longer the planner's, a setting that is no longer the env file's."""
    for path, text in recipe_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run examples/recipe_pages.py --write"


def commands(page: Path) -> Iterator[list[str]]:
    """Return the words of the command lines of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in text.split("```")[1::2]:
        yield from (shlex.split(line) for line in block.splitlines() if line.strip())


def test_commands_are_real() -> None:
    """Checks all pages: scripts and env files exist, and every flag is in its command's --help. Catches: a
    command line that was never typed."""
    flags: dict[tuple[str, ...], set[str]] = {}
    for model in MODELS:
        for words in commands(EXAMPLES / model.folder / "README.md"):
            if words[0] == "python":
                assert (ROOT / words[1]).is_file()
                end = 2 if words[2].startswith("-") else 3
                given = {word for word in words[end:] if word.startswith("--")}
                flags.setdefault(tuple(words[1:end]), set()).update(given)
            elif words[0].startswith("launch/"):
                assert (ROOT / words[0]).is_file() and (ROOT / words[-1]).is_file()
            else:
                assert words[0] in ("mkdir", "hf", "lm_eval", "for", "done"), words
    assert {name[0] for name in flags} == {"examples/openr1.py"} | {
        f"tools/{tool}.py" for tool in ("preprocess_data", "plan", "convert", "evaluate")
    }
    for command, given in flags.items():
        done = run_tool(*command, "--help", cwd=ROOT)
        assert done.status == 0, done.error
        unknown = [flag for flag in given if f"{flag} " not in done.out and f"{flag}\n" not in done.out]
        assert not unknown, (command, unknown)


def test_the_planners_command_says_what_the_table_says() -> None:
    """Catches: a command that plans another run than the recipe's, a price without effect."""
    recipe = RECIPES["qwen-r1-32b/paper"]
    words = shlex.split(recipe_pages.plan_command(recipe).replace("\\\n", ""))
    done = run_tool(*words[1:], cwd=ROOT)
    assert done.status == 0, done.error
    best = json.loads(done.out.splitlines()[-1])["best"][0]
    shown = recipe_pages.figures(recipe)
    plan = recipe.plan
    assert best["memory_bytes"]["total"] == plan.memory.total
    assert list(best["hours"].values()) == [plan.hours(count) for count in recipe.steps.values()]
    assert list(best["usd"].values()) == [2.5 * value for value in best["device_hours"].values()]
    assert shown["USD"] == "; ".join(f"{value:,.0f}" for value in best["usd"].values())
    assert "price, as given: 2.5 USD" in done.out and "  USD" in done.out
