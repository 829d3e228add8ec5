#!/usr/bin/env python
"""Make the README of each model's recipes and the table of all recipes.

Settings come from the env files, figures from the planner, text from recipe.md. A test fails if a page is out
of date.

    python examples/recipe_pages.py            name the pages that are out of date; exit status 1 if any is
    python examples/recipe_pages.py --write    write them
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from recipes import HERE, MODELS, RATIOS, Model, Recipe

from megatron_dms.command_line import Parser, say, say_error
from megatron_dms.planning.job import RECIPES, RankLayout
from megatron_dms.planning.models import preset

PRICE = 2.5
"""USD for an hour of an H100: an assumption and nobody's offer."""
_HARNESS = "gsm8k,mmlu,arc_challenge,hellaswag"
_MARKS = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)


def _number(value: float) -> str:
    """Return a number with two digits, or with all digits before the point."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _numbers(values: list[float]) -> str:
    return "; ".join(map(_number, values))


def layout_text(layout: RankLayout) -> str:
    """Describe a layout by everything that is neither 1 nor off."""
    sizes = (("TP", layout.tp), ("PP", layout.pp), ("CP", layout.cp), ("DP", layout.dp))
    parts = [" × ".join(f"{name} {size}" for name, size in sizes if size > 1)]
    parts += ["SP"] * layout.sp + [f"micro batch {layout.micro}"] * (layout.micro > 1)
    return ", ".join(parts + [f"recompute {layout.recompute}"] * (layout.recompute != "none"))


def figures(recipe: Recipe) -> dict[str, str]:
    """Return the planner's figures; they are also in the table of all recipes."""
    plan, steps = recipe.plan, list(recipe.steps.values())
    devices = [plan.device_hours(count) for count in steps]
    return {
        "nodes": str(recipe.nodes),
        "layout": layout_text(recipe.layout),
        "GB": _number(plan.memory.total / 1e9),
        "s a step": _number(plan.seconds),
        "hours": _numbers([plan.hours(count) for count in steps]),
        "H100-hours": _numbers(devices),
        "USD": _numbers([PRICE * value for value in devices]),
    }


def settings(recipe: Recipe) -> dict[str, str]:
    """Return the settings of the env file."""
    flags, dms = recipe.flags, recipe.dms
    trained = {"all": "all weights", "predictor": "the predictor alone"}[dms.train]
    return {
        "trained": trained,
        "teacher": "the frozen base itself" if dms.teacher == "self" else "a frozen second model",
        "predictor, window": f"{dms.predictor}, {dms.window}",
        "loss": dms.kl.replace("_", " ‖ ").join(("KL(", ")")),
        "tokens × samples of a step": f"{flags.seq_length} × {flags.global_batch_size}",
        "learning rate": f"{flags.lr}, constant",
        "steps: zeroing, per unit of CR, in all": (
            f"{dms.zeroing_steps}, {dms.steps_per_cr:g}, {flags.train_iters}"
        ),
        "checkpoints": (
            f"{flags.train_iters // flags.save_interval} of {_number(recipe.checkpoint_bytes / 1e9)} GB"
        ),
    }


def plan_command(recipe: Recipe) -> str:
    """Return the command by which the planner gives the same figures."""
    layout, setting, dms = recipe.layout, recipe.setting, recipe.dms
    words = f"--model {recipe.model.preset} --recipe {recipe.name} --ranks {layout.ranks}"
    words += f" --context {setting.context} --batch {setting.batch} \\\n   "
    words += f" --steps-per-cr {dms.steps_per_cr:g} --zeroing-steps {dms.zeroing_steps} --price {PRICE:g}"
    words += f" --tp {layout.tp} --pp {layout.pp} --cp {layout.cp} \\\n   "
    words += f" --micro-batch {layout.micro} --recompute {layout.recompute}"
    words += " --sp" if layout.sp else " --no-sp"
    return f"python tools/plan.py train {words}{' --fuse-output-layer' * setting.fuse_output_layer}"


def _exported(recipe: Recipe, cr: int) -> str:
    return f"hf/{recipe.model.local}-{recipe.name}-{cr}x"


def _exports(recipe: Recipe) -> str:
    return "\n".join(
        f"python tools/convert.py export --megatron {recipe.flags.save} --iteration {step} \\\n"
        f"    --hf {_exported(recipe, cr)}"
        for cr, step in recipe.steps.items()
    )


def _evaluation(recipe: Recipe) -> str:
    model = recipe.model
    if not model.tasks:
        return "\n".join(
            f"lm_eval --model hf --model_args pretrained={folder},trust_remote_code=True \\\n"
            f"    --tasks {_HARNESS} --batch_size 8"
            for folder in (f"hf/{model.local}", *(_exported(recipe, cr) for cr in RATIOS))
        )
    budgets = [f"{chains}-{recipe.setting.context}-{cr}" for cr in (1, *RATIOS) for chains in (1, 4)]
    folders = "".join(f" \\\n        --dms {cr}={_exported(recipe, cr)}" for cr in RATIOS)
    return (
        f"for task in {' '.join(model.tasks)}; do\n"
        "    python tools/evaluate.py run --task $task --methods vanilla,dms --seeds 0,1,2 \\\n"
        f"        --batch-size 4 --budgets {','.join(budgets)} \\\n"
        f"        --model hf/{model.local}{folders} \\\n"
        f"        --out out/{model.folder}/$task\n"
        "done"
    )


def _table(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def page(model: Model) -> str:
    """Return the README of a model's folder."""
    recipes = {name: model.recipe(name) for name in RECIPES}
    columns = [settings(recipe) | figures(recipe) for recipe in recipes.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    gpqa = "GPQA is gated: accept its terms on the hub and `hf auth login` first, or leave it out."
    notes = " ".join([model.notes] + [gpqa] * ("gpqa" in model.tasks))
    notes = textwrap.fill(notes, 120, break_long_words=False, break_on_hyphens=False)
    text = model.data == "text"
    jsonl = f"data/openr1{'-text' * text}.jsonl"
    values = {
        "title": model.title,
        "hub": model.hub,
        "local": model.local,
        "folder": model.folder,
        "parameters": f"{preset(model.preset).parameters():,}",
        "notes": f"\n\n{notes}" if notes else "",
        "table": _table([["", *(f"`{name}.env`" for name in recipes)], *rows]),
        "exclude": f' --exclude "{model.exclude}"' if model.exclude else "",
        "jsonl": jsonl,
        "openr1": f"python examples/openr1.py --out {jsonl}{' --text' * text}",
        "template": " --chat-template examples/r1_with_thoughts.jinja" if model.data == "r1" else "",
        "evaluation": _evaluation(recipes["adapter"]),
    }
    for name, recipe in recipes.items():
        values |= {f"{name}_plan": plan_command(recipe), f"{name}_exports": _exports(recipe)}
    return Template((HERE / "recipe.md").read_text(encoding="utf-8")).substitute(values)


def index(text: str) -> str:
    """Return the page of all recipes, with a new table between its two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    rows = [
        [f"[{model.title}]({model.folder}/README.md)", name, *figures(model.recipe(name)).values()]
        for model in MODELS
        for name in RECIPES
    ]
    heads = ["model", "recipe", *figures(MODELS[0].recipe("paper"))]
    new, count = _MARKS.subn(rf"\g<1>{_table([heads, *rows])}\n\g<2>", text)
    if count != 1:
        raise ValueError(f"examples/README.md: found {count} tables between marks, expected one")
    return new


def pages() -> dict[Path, str]:
    """Return every page as it should be."""
    found = {HERE / model.folder / "README.md": page(model) for model in MODELS}
    return found | {HERE / "README.md": index((HERE / "README.md").read_text(encoding="utf-8"))}


def main() -> int:
    """Check or write the pages, and return the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the pages that are out of date")
    options = parser.parse_args()
    try:
        old = {
            path: text
            for path, text in pages().items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        }
        for path, text in old.items():
            if options.write:
                path.write_text(text, encoding="utf-8")
            say(f"{'written' if options.write else 'out of date'}: {path.relative_to(HERE.parent)}")
    except (ValueError, OSError) as error:
        return say_error(error)
    return 1 if old and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
