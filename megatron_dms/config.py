"""DMSConfig: every setting of the method once, with its meaning, unit and source.

The command-line flags (`arguments.py`), what a checkpoint stores and what an export writes are all derived
from this class. Section numbers are those of the DMS paper (arXiv 2506.05345).
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_dms.compression_method import METHODS, CompressionMethod
from megatron_dms.ops.schedule import CompressionSchedule

THRESHOLD = -40.0
"""Default of attention_threshold; what it leaves out is derived in kernels/survivors.py."""

BORROWED_CHANNEL_PREDICTORS = ("query_channel", "key_channel")


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None, scope: str = "schedule") -> Any:
    """A field with its help text.

    Its scope says who must agree with a checkpoint's value: "model", which every run from its weights must;
    "schedule", which a run that resumes must; "run", which is how and not what, nobody.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "scope": scope})


@dataclass(frozen=True)
class DMSConfig:
    """All settings of one retrofit.

    Raises:
        ValueError: on construction, naming the value found, what is expected, and the fix.
    """

    method: str = _setting(
        "evict",
        "what becomes of a pair that is not kept: evict (DMS), or merge it into the pair before, as DMC does "
        "(arXiv 2403.09636): for comparison with DMS; merge needs the predictor key_channel, granularity "
        "head, window 0 and lag 1",
        choices=tuple(METHODS),
        scope="model",
    )
    predictor: str = _setting(
        "query_channel",
        "where the eviction logit comes from: the last channel of the first query head of each group, the "
        "last channel of the key, or a linear layer of its own on the residual stream (section 3)",
        choices=("query_channel", "key_channel", "linear"),
        scope="model",
    )
    granularity: str = _setting(
        "head",
        "one decision per KV head, or one per layer (KV head 0's)",
        choices=("head", "layer"),
        scope="model",
    )
    alpha_scale: float = _setting(
        100.0, "eviction logit = alpha_scale * raw value - alpha_offset; > 0", scope="model"
    )
    alpha_offset: float = _setting(
        5.0,
        "see alpha_scale; 5 makes the first decisions sigmoid(-5) = 0.007: nothing is evicted at the start",
        scope="model",
    )
    window: int = _setting(
        256,
        "tokens for which a pair marked for eviction stays readable; 0 or more (section 3)",
        scope="model",
    )
    lag: int = _setting(
        1,
        "tokens after a pair at which it is judged: 1 as in the released checkpoints, 0 as in the paper's "
        "text, equal to the window for immediate eviction, the paper's inferior ablation",
        scope="model",
    )
    temperature: float = _setting(0.1, "temperature of the relaxed decision, > 0 (section 3)", scope="model")
    importance_scale: float = _setting(
        1.0,
        "merge: a pair's weight in the mean is sigmoid(importance_scale * raw value - importance_offset), "
        "raw value: the last channel of its group's first query head; > 0",
        scope="model",
    )
    importance_offset: float = _setting(0.0, "merge: see importance_scale", scope="model")
    final_cr: float = _setting(8.0, "compression ratio that is reached and then held, 1 or more (section 3)")
    steps_per_cr: float = _setting(100.0, "training steps per unit of compression ratio, > 0 (section 3)")
    anneal: str = _setting(
        "cr",
        "what grows linearly: the compression ratio, or the evicted fraction",
        choices=("cr", "fraction"),
    )
    compression_weight: float = _setting(1.0, "factor on the compression loss, 0 or more")
    kl: str = _setting(
        "teacher_student",
        "distillation loss per token: KL(teacher || student) or KL(student || teacher)",
        choices=("teacher_student", "student_teacher"),
    )
    kl_temperature: float = _setting(
        1.0,
        "what both logits are divided by in the distillation loss, > 0; the loss is not multiplied by its "
        "square",
    )
    fuse_output_layer: bool = _setting(
        False,
        "in training, compute the distillation loss from hidden states, a few tokens at a time, so that the "
        "logits of whole sequences are never in memory",
        scope="run",
    )
    zeroing_steps: int = _setting(
        0,
        "training steps, before the retrofit proper, that fade a borrowed channel out by distillation alone; "
        "then its weights are set to zero. 0 = none; wanted once for a model that was never retrofitted",
    )
    train: str = _setting(
        "all",
        "what is trained: all weights (the paper's recipe), or the predictor alone: its norm and projection "
        "(linear), or the borrowed rows of the QKV weight and bias",
        choices=("all", "predictor"),
    )
    teacher: str | None = _setting(
        None,
        "the frozen teacher: a HF folder or a Megatron checkpoint of the same tokenizer, or 'self' (linear "
        "predictor with --dms-train predictor only: the same weights with eviction off, no second copy)",
    )
    attention_backend: str = _setting(
        "auto",
        "what computes attention in training: auto is triton on CUDA and dense elsewhere; see "
        "docs/training.md",
        choices=("auto", "dense", "flash", "flex", "triton"),
        scope="run",
    )
    attention_threshold: float = _setting(
        THRESHOLD,
        "triton: keys whose log(1 - alpha) is below this are not read beyond their window; < 0, in nats",
        scope="run",
    )
    start_limit: float = _setting(
        1800.0,
        "watchdog: seconds from the start to the first microbatch; 0 = no limit; see docs/cluster.md",
        scope="run",
    )
    step_limit: float = _setting(
        480.0,
        "watchdog: seconds in which a rank must begin another microbatch, of training or validation, the "
        "first with its compilation too; 0 = no limit",
        scope="run",
    )
    save_limit: float = _setting(
        1800.0, "watchdog: seconds that saving a checkpoint may take; 0 = no limit", scope="run"
    )
    heartbeat_limit: float = _setting(
        120.0,
        "watchdog: seconds without a heartbeat after which a rank is lost; 0 = no limit",
        scope="run",
    )

    keep_checkpoints: int = _setting(
        0,
        "finished checkpoints that stay in --save once a new one is verified, that one among them; 0 = all",
        scope="run",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            choices, value = item.metadata["choices"], getattr(self, item.name)
            if choices and value not in choices:
                raise ValueError(f"{flag_of(item.name)} is {value!r}, expected one of {', '.join(choices)}")
            if item.type is float:
                self._require(math.isfinite(value), item.name, "a finite number")
        self._require(self.window >= 0, "window", ">= 0 tokens")
        self._require(
            0 <= self.lag <= self.window + 1, "lag", f"between 0 and window + 1 = {self.window + 1}"
        )
        self._require(self.temperature > 0, "temperature", "> 0")
        self._require(self.alpha_scale > 0, "alpha_scale", "> 0")
        self._require(self.final_cr >= 1, "final_cr", ">= 1 (1 = nothing is evicted)")
        self._require(self.steps_per_cr > 0, "steps_per_cr", "> 0 steps")
        self._require(self.compression_weight >= 0, "compression_weight", ">= 0")
        self._require(self.zeroing_steps >= 0, "zeroing_steps", ">= 0 steps")
        self._require(self.kl_temperature > 0, "kl_temperature", "> 0")
        self._require(self.attention_threshold < 0, "attention_threshold", "< 0")
        self._require(self.keep_checkpoints >= 0, "keep_checkpoints", ">= 0 (0 = all)")
        if self.attention_threshold != THRESHOLD and self.attention_backend not in ("auto", "triton"):
            raise ValueError(
                f"--dms-attention-threshold {self.attention_threshold} with --dms-attention-backend "
                f"{self.attention_backend}: only triton leaves keys out; drop it"
            )
        self._require(self.importance_scale > 0, "importance_scale", "> 0")
        for name in ("start_limit", "step_limit", "save_limit", "heartbeat_limit"):
            self._require(getattr(self, name) >= 0, name, ">= 0 seconds")
        self._check_method()
        if self.zeroing_steps and not self.borrows_channel:
            raise ValueError(
                f"--dms-predictor linear together with --dms-zeroing-steps {self.zeroing_steps}: the linear "
                "predictor borrows no channel, so there is nothing to fade out; use --dms-zeroing-steps 0"
            )
        if self.teacher == "self" and (self.borrows_channel or self.train != "predictor"):
            raise ValueError(
                f"--dms-teacher self with --dms-predictor {self.predictor} and --dms-train {self.train}: the "
                "student's own weights are the teacher only while they stay as they are; use --dms-predictor "
                "linear --dms-train predictor, or name a teacher checkpoint"
            )

    def _check_method(self) -> None:
        """Check the settings that the method requires (the user says them, nobody guesses them), and that no
        setting of another method is given."""
        method = self.compression_method
        for name, value in method.required.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"--dms-method {self.method} with {flag_of(name)} {getattr(self, name)}: "
                    f"{method.description} is defined for {flag_of(name)} {value} only"
                )
        defaults = {item.name: item.default for item in fields(self)}
        for other in METHODS.values():
            for name in other.own_settings:
                if other is not method and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{flag_of(name)} {getattr(self, name)} with --dms-method {self.method}: only "
                        f"{other.name} reads this setting; drop it"
                    )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{flag_of(name)} is {getattr(self, name)}, expected {expected}")

    @property
    def compression_method(self) -> CompressionMethod:
        """What becomes of a pair that is not kept, and everything that depends on it."""
        return METHODS[self.method]

    @property
    def borrows_channel(self) -> bool:
        """Whether the eviction logit is read from a channel of the queries or keys."""
        return self.predictor in BORROWED_CHANNEL_PREDICTORS

    @property
    def schedule(self) -> CompressionSchedule:
        """The compression schedule; its step 0 is training step `zeroing_steps`."""
        return CompressionSchedule(self.final_cr, self.steps_per_cr, self.anneal)

    def fade(self, step: int) -> float:
        """Factor on the borrowed channel at training step `step` of the zeroing phase (DMS paper, appendix).

        It reaches 0 after 80 % of the phase: the rest lets the model settle, and Adam's momentum for the rows
        that are about to be zeroed die away.
        """
        return max(0.0, 1 - step / (0.8 * self.zeroing_steps))

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DMSConfig":
        """The inverse of to_dict; an unknown key is an error."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown DMS settings {unknown}; was this checkpoint written by a newer version?"
            )
        return cls(**values)

    def check_against(self, stored: dict[str, Any], resuming: bool) -> None:
        """Compare with the settings that a checkpoint holds.

        Args:
            stored: the checkpoint's settings; keys that it lacks are not compared.
            resuming: True if training goes on where the checkpoint stopped, so that the schedule must agree
                too; False if it starts anew from the checkpoint's weights.

        Raises:
            ValueError: names the field and both values.
        """
        if stored:
            stored = {"method": "evict"} | stored  # a checkpoint from before there was a choice
        for item in fields(self):
            scope = item.metadata["scope"]
            if item.name not in stored or scope == "run" or (scope == "schedule" and not resuming):
                continue
            if item.name == "teacher" and "self" not in (self.teacher, stored["teacher"]):
                continue  # a folder may have moved
            if stored[item.name] != getattr(self, item.name):
                fix = f"use {flag_of(item.name)} {stored[item.name]}"
                if scope == "schedule":
                    fix += ", or --finetune to start a new schedule from these weights"
                raise ValueError(
                    f"{flag_of(item.name)} is {getattr(self, item.name)}, but the checkpoint was trained "
                    f"with {stored[item.name]}; {fix}"
                )


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    return "--dms-" + name.replace("_", "-")
