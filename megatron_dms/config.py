"""DMSConfig: every setting of a retrofit once, with its meaning, unit and source.

The settings that belong to the model are those of DecisionSettings (hf/configuration_dms.py), which exports
share; this module adds the settings of a run. The command-line flags (`arguments.py`) and what a checkpoint
stores are derived from DMSConfig. Section numbers are those of the DMS paper (arXiv 2506.05345).
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_dms.compression_method import METHODS, CompressionMethod
from megatron_dms.hf.configuration_dms import LATER_FIELDS, DecisionSettings
from megatron_dms.ops.schedule import CompressionSchedule

THRESHOLD = -40.0
"""The default of attention_threshold. kernels/survivors.py derives which keys it leaves out."""

BORROWED_CHANNEL_PREDICTORS = ("query_channel", "key_channel")


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None, scope: str = "schedule") -> Any:
    """Return a field with its help text.

    The scope says which runs must agree with a checkpoint's value: "model" means every run from its weights,
    "schedule" means a run that resumes, and "run" means none, because the setting changes how a result is
    computed and not the result.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "scope": scope})


@dataclass(frozen=True)
class DMSConfig(DecisionSettings):
    """All settings of one retrofit: those of the model, and those of the run.

    Raises:
        ValueError: on construction, naming the value found, what is expected, and the fix.
    """

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
    resume_on_other_samples: bool = _setting(
        False,
        "go on from a checkpoint with other training data, --seq-length or --seed than the run so far had",
        scope="run",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @classmethod
    def name_of(cls, name: str) -> str:
        """Return the flag of a setting, by which messages name it."""
        return flag_of(name)

    @property
    def compression_method(self) -> CompressionMethod:
        """The object that holds what becomes of a pair that is not kept, and everything that follows."""
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
        """Return the factor on the borrowed channel at a step of the zeroing phase (DMS paper, appendix).

        The factor reaches 0 after 80 % of the phase. In the rest of the phase the model settles, and Adam's
        momentum for the rows that are about to be zeroed dies away.
        """
        return max(0.0, 1 - step / (0.8 * self.zeroing_steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a checkpoint stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DMSConfig":
        """Build a config from what `to_dict` returned; an unknown key is an error."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown DMS settings {unknown}; was this checkpoint written by a newer version?"
            )
        return cls(**values)

    def check_against(self, stored: dict[str, Any], resuming: bool) -> None:
        """Compare with the settings that a checkpoint holds.

        Args:
            stored: the checkpoint's settings. A setting that the checkpoint lacks is not compared.
            resuming: True if training goes on where the checkpoint stopped, so that the schedule must agree
                too. False if a new schedule starts from the checkpoint's weights.

        Raises:
            ValueError: names the field and both values.
        """
        if stored:
            # a checkpoint from before there was a choice, or one that leaves it out
            stored = {"method": "evict", **LATER_FIELDS} | stored
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
    """Return the command-line flag of a field."""
    return "--dms-" + name.replace("_", "-")
