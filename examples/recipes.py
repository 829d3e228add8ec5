"""The recipes: a model and an env file, read into the planner's terms. Arithmetic only, no torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_dms.command_line import Parser
from megatron_dms.config import DMSConfig
from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.job import RECIPES, Job, RankLayout
from megatron_dms.planning.models import preset
from megatron_dms.planning.search import Plan, plan_layout, steps_to
from megatron_dms.training.startup import parse_dms_flags

HERE = Path(__file__).resolve().parent
RATIOS = (4, 8)
"""Compression ratios that are planned, exported and evaluated."""
WEIGHT, TRAINED = 2, 12
"""Bytes in a checkpoint: bf16 of every parameter; fp32 master and two moments of a trained one."""


@dataclass(frozen=True)
class Model:
    """The facts about a model that no file in its folder holds.

    preset: its name in the planner. hub: its name on the hub. data: chat, r1 (a chat whose template drops the
    thoughts) or text (for base models). tasks: tasks of tools/evaluate.py; without tasks,
    lm-evaluation-harness is used. exclude: a pattern of files that are not downloaded.
    """

    folder: str
    preset: str
    title: str
    hub: str
    data: str
    tasks: tuple[str, ...] = ()
    notes: str = ""
    exclude: str = ""

    @property
    def local(self) -> str:
        """The name of its folder in hf/."""
        return self.hub.partition("/")[2]

    def recipe(self, name: str) -> "Recipe":
        """Read a recipe of this model; `name` is paper or adapter."""
        return read_recipe(HERE / self.folder / f"{name}.env", self)


@dataclass(frozen=True)
class Recipe:
    """The content of an env file. flags: the flags of pretrain_dms.py that the pages show."""

    model: Model
    name: str
    nodes: int
    flags: argparse.Namespace
    dms: DMSConfig
    setting: Job
    layout: RankLayout

    @property
    def plan(self) -> Plan:
        """The plan on H100s, whether or not it fits into memory."""
        return plan_layout(self.setting, self.layout, DEVICES["h100"], Assumptions())

    @property
    def steps(self) -> dict[int, int]:
        """Training steps up to each CR."""
        return {cr: steps_to(cr, self.dms.steps_per_cr, self.dms.zeroing_steps) for cr in RATIOS}

    @property
    def checkpoint_bytes(self) -> float:
        """Size of one training checkpoint."""
        model = self.setting.model
        predictors = model.layers * model.predictor_parameters() if self.setting.recipe.linear else 0
        trained = model.parameters() if self.setting.recipe.trains_all else predictors
        return WEIGHT * (model.parameters() + predictors) + TRAINED * trained


def read_env(path: Path) -> dict[str, str]:
    """Read NAME=value from an env file without mistakes, as launch/settings.sh does (a test compares
    both)."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    pairs = (line.split("=", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name: value.strip() for name, value in pairs}


def read_recipe(path: Path, model: Model) -> Recipe:
    """Read an env file that is named after its recipe.

    Raises:
        ValueError: its DMS settings are invalid, or belong to another recipe.
    """
    settings = read_env(path)
    words, nodes = settings["TRAIN_ARGS"].split(), int(settings["NODES"])
    flags, dms, kind = _flags(words), parse_dms_flags(words), RECIPES[path.stem]
    found = (dms.train == "all", dms.predictor == "linear", dms.teacher != "self")
    if found != (kind.trains_all, kind.linear, kind.own_teacher):
        raise ValueError(f"{path}: found --dms-* flags of another recipe, expected those of {kind.name}")
    tp, pp, cp = (
        flags.tensor_model_parallel_size,
        flags.pipeline_model_parallel_size,
        flags.context_parallel_size,
    )
    dp = nodes * int(settings["GPUS_PER_NODE"]) // (tp * pp * cp)
    return Recipe(
        model,
        kind.name,
        nodes,
        flags,
        dms,
        Job(
            *(preset(model.preset), kind, flags.seq_length, flags.global_batch_size),
            fuse_output_layer=dms.fuse_output_layer,
            distributed_optimizer=flags.use_distributed_optimizer,
        ),
        RankLayout(
            *(tp, pp, cp, dp, flags.sequence_parallel, flags.micro_batch_size, flags.recompute_granularity)
        ),
    )


def _flags(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="TRAIN_ARGS", add_help=False)
    for name in ("seq-length", "micro-batch-size", "global-batch-size", "train-iters", "save-interval"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("tensor-model", "pipeline-model", "context"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    for name in ("save", "lr"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("sequence-parallel", "use-distributed-optimizer"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--recompute-granularity", default="none")
    return parser.parse_known_args(words)[0]


_REASONING = ("aime24", "math500", "gpqa", "livecodebench")
_GATED = "Gated: accept Meta's licence on the hub first, then `hf auth login`."
_BASE = (
    "A base model without a chat template: problems and answers are given to it as plain text, and it is "
    "measured by lm-evaluation-harness."
)
_THOUGHTS = (
    "The tokenizer's own chat template drops all thoughts up to `</think>`, which `tools/preprocess_data.py` "
    "refuses; [r1_with_thoughts.jinja](../r1_with_thoughts.jinja) keeps them."
)
MODELS = (
    Model(
        *("llama-3.2-1b-instruct", "llama-3.2-1b", "Llama 3.2 1B Instruct"),
        *("meta-llama/Llama-3.2-1B-Instruct", "chat", ("gsm8k",)),
        notes=_GATED,
        exclude="original/*",
    ),
    Model(
        *("llama-2-7b", "llama-2-7b", "Llama 2 7B", "meta-llama/Llama-2-7b-hf", "text"),
        notes=f"{_GATED} {_BASE}",
        exclude="*.bin",
    ),
    Model(
        *("llama-3.1-8b", "llama-3.1-8b", "Llama 3.1 8B", "meta-llama/Llama-3.1-8B", "text"),
        notes=f"{_GATED} {_BASE}",
        exclude="original/*",
    ),
    *(
        Model(
            *(f"qwen-r1-{size.lower()}", f"qwen-r1-{size.lower()}", f"Qwen-R1 {size}"),
            *(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}", "r1", _REASONING),
            notes=_THOUGHTS,
        )
        for size in ("1.5B", "7B", "32B")
    ),
    Model(
        *("qwen3-8b", "qwen3-8b", "Qwen3-8B", "Qwen/Qwen3-8B", "chat", _REASONING),
        notes="The paper's window is 256; 512 is that of nvidia/Qwen3-8B-DMS-8x, the checkpoint that was "
        "released of this model.",
    ),
)
