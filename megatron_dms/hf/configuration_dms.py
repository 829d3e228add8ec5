"""The DMS settings of a model: how it decides which pairs to forget, and the `dms_*` keys of a config.json.

`DecisionSettings` are the settings that training, checkpoints and exports share. `DMSSettings` adds what only
an exported model has, and maps all of it to and from config.json. The keys are the ones NVIDIA's DMS
checkpoints use, plus `dms_predictor` and `dms_lag`, which name what NVIDIA's format leaves implicit. This
module imports nothing outside the standard library, so a converter can check a config without torch. (It is
copied flat into every exported checkpoint, so it may use relative imports only.)
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREDICTORS = ("query_channel", "key_channel", "linear")
GRANULARITIES = ("head", "layer")
METHODS = ("evict", "merge")
ZEROINGS = ("around_rope", "before_rope")
MERGING_REQUIRES: Mapping[str, object] = {
    "predictor": "key_channel",
    "granularity": "head",
    "window": 0,
    "lag": 1,
    "zeroing": "around_rope",
}
"""The settings for which alone merging is defined: field -> value."""
MERGING_FIELDS = ("method", "importance_scale", "importance_offset")
"""The fields that a checkpoint or a config.json holds for a model that merges, and for no other model."""
LATER_FIELDS: Mapping[str, object] = {"zeroing": ZEROINGS[0]}
"""The fields that a checkpoint or a config.json holds only where they differ from this default: files
that are older than the field stay as they are."""

_FIELDS = {
    "dms_predictor": "predictor",
    "dms_separate_alpha": "separate_alpha",
    "dms_alpha_per": "granularity",
    "dms_window_size": "window",
    "dms_lag": "lag",
    "dms_zeroing": "zeroing",
    "dms_alpha_scale": "alpha_scale",
    "dms_initial_alpha_offset": "alpha_offset",
    "dms_tau": "temperature",
    "dms_cr": "target_cr",
    "dms_disable_eviction": "disable_eviction",
    **{f"dms_{name}": name for name in MERGING_FIELDS},
}
"""Key of config.json -> attribute of DMSSettings, in the order in which the keys are written."""
_KEYS = {name: key for key, name in _FIELDS.items()}
KNOWN_KEYS = frozenset(_FIELDS)
# NVIDIA's exporter writes these keys for its own runtime: they say how, never what, is computed.
OTHER_RUNTIME_KEYS = frozenset(
    {
        "dms_paged_attention_block_size",
        "dms_chunked_prefill",
        "dms_preallocate_for_tokens",
        "dms_compile_limit",
        "dms_manual_inference_mode",
    }
)
# Without these keys nobody can tell what the model does. The other keys have a default in every format.
NEEDED_KEYS = ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset")


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Return a field with its help text, which is also the help of the training flag of the same name."""
    return field(default=default, metadata={"help": help, "choices": choices, "scope": "model"})


@dataclass(frozen=True)
class DecisionSettings:
    """How a model decides which pairs to forget. Every run from the model's weights must agree on them.

    Raises:
        ValueError: on construction, naming the setting, the value found and what is expected.
    """

    method: str = _setting(
        "evict",
        "what becomes of a pair that is not kept: evict (DMS), or merge it into the pair before, as DMC does "
        "(arXiv 2403.09636): for comparison with DMS; merge needs the predictor key_channel, granularity "
        "head, window 0 and lag 1",
        choices=METHODS,
    )
    predictor: str = _setting(
        "query_channel",
        "where the eviction logit comes from: the last channel of the first query head of each group, the "
        "last channel of the key, or a linear layer of its own on the residual stream (section 3)",
        choices=PREDICTORS,
    )
    granularity: str = _setting(
        "head", "one decision per KV head, or one per layer (KV head 0's)", choices=GRANULARITIES
    )
    alpha_scale: float = _setting(100.0, "eviction logit = alpha_scale * raw value - alpha_offset; > 0")
    alpha_offset: float = _setting(
        5.0,
        "see alpha_scale; 5 makes the first decisions sigmoid(-5) = 0.007: nothing is evicted at the start",
    )
    window: int = _setting(
        256, "tokens for which a pair marked for eviction stays readable; 0 or more (section 3)"
    )
    lag: int = _setting(
        1,
        "tokens after a pair at which it is judged: 1 as in the released checkpoints, 0 as in the paper's "
        "text, equal to the window for immediate eviction, the paper's inferior ablation",
    )
    zeroing: str = _setting(
        ZEROINGS[0],
        "where the borrowed channel is set to zero: before RoPE and again after it, so that it takes no part "
        "in attention, or before RoPE only, as FastDMS's runtime does: RoPE then mixes channel D/2-1 into it",
        choices=ZEROINGS,
    )
    temperature: float = _setting(0.1, "temperature of the relaxed decision, > 0 (section 3)")
    importance_scale: float = _setting(
        1.0,
        "merge: a pair's weight in the mean is sigmoid(importance_scale * raw value - importance_offset), "
        "raw value: the last channel of its group's first query head; > 0",
    )
    importance_offset: float = _setting(0.0, "merge: see importance_scale")

    def __post_init__(self) -> None:
        for item in fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value not in choices:
                raise ValueError(
                    f"{self.name_of(item.name)} is {value!r}, expected one of {', '.join(choices)}"
                )
            if item.type is float:
                self._require(_is_finite(value), item.name, "a finite number")
        for name in ("window", "lag"):
            self._require(type(getattr(self, name)) is int, name, "a whole number of tokens")
        self._require(self.window >= 0, "window", ">= 0 tokens")
        self._require(
            0 <= self.lag <= self.window + 1, "lag", f"between 0 and window + 1 = {self.window + 1}"
        )
        self._require(self.temperature > 0, "temperature", "> 0")
        if self.predictor == "linear" and self.zeroing != ZEROINGS[0]:
            raise ValueError(
                f"{self.name_of('zeroing')} is {self.zeroing!r} with the linear predictor, which borrows no "
                "channel; remove it"
            )
        self._require(self.importance_scale > 0, "importance_scale", "> 0")

    @classmethod
    def name_of(cls, name: str) -> str:
        """Return what a message calls a setting: its key in config.json, or its flag (DMSConfig)."""
        return _KEYS[name]

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self.name_of(name)} is {getattr(self, name)!r:.80}, expected {expected}")

    @classmethod
    def stored_names(cls, method: str) -> tuple[str, ...]:
        """Return the fields that `args.dms` must hold; without `method`, a model evicts."""
        left_out = {*MERGING_FIELDS, *LATER_FIELDS}
        names = tuple(item.name for item in fields(DecisionSettings) if item.name not in left_out)
        return names + (MERGING_FIELDS if method == "merge" else ())

    def stored(self) -> dict[str, object]:
        """Return the settings as `args.dms` of an imported model holds them."""
        names = (*self.stored_names(self.method), *self._changed_later_fields())
        return {name: getattr(self, name) for name in names}

    def _changed_later_fields(self) -> list[str]:
        return [name for name, default in LATER_FIELDS.items() if getattr(self, name) != default]


@dataclass(frozen=True)
class DMSSettings(DecisionSettings):
    """The settings of one exported model. Construction raises ValueError on any bad value."""

    target_cr: float | None = None
    """Compression ratio the checkpoint was trained to. For the reader only."""
    disable_eviction: bool = False
    """Keep every pair (for comparison). The borrowed channel stays out of attention all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = tuple(getattr(self, name) for name in MERGING_REQUIRES)
        wanted = tuple(MERGING_REQUIRES.values())
        if self.method == "merge" and found != wanted:
            raise ValueError(
                f"dms_method is 'merge' with ({', '.join(map(self.name_of, MERGING_REQUIRES))}) = {found}, "
                f"expected {wanted}, for which alone merging is defined"
            )
        for name in ("importance_scale", "importance_offset"):
            value = getattr(self, name)
            if self.method != "merge" and value != getattr(type(self), name):
                raise ValueError(
                    f"{self.name_of(name)} is {value} with dms_method {self.method!r}: only 'merge' weighs "
                    "pairs; remove it"
                )
        if self.target_cr is not None:
            self._require(_is_finite(self.target_cr), "target_cr", "a finite number")
            self._require(self.target_cr >= 1, "target_cr", "null or a ratio of at least 1")
        if not isinstance(self.disable_eviction, bool):
            raise ValueError(f"dms_disable_eviction is {self.disable_eviction!r}, expected true or false")

    @property
    def separate_alpha(self) -> bool:
        """Whether the predictor has tensors of its own: NVIDIA's name for the linear predictor."""
        return self.predictor == "linear"

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> "DMSSettings":
        """Parse the keys of a config.json (those that do not start with `dms_` are left alone).

        Raises:
            ValueError: unknown or missing key, bad value, or two keys that contradict each other; names them.
        """
        dms = {key: value for key, value in entries.items() if key.startswith("dms_")}
        unknown = sorted(dms.keys() - KNOWN_KEYS - OTHER_RUNTIME_KEYS)
        if unknown:
            raise ValueError(
                f"unknown DMS keys {unknown} in the model config; known are {sorted(KNOWN_KEYS)} and, for "
                f"other runtimes, {sorted(OTHER_RUNTIME_KEYS)}: remove them or use a version that knows them"
            )
        missing = [key for key in NEEDED_KEYS if key not in dms]
        if missing:
            names = ", ".join(missing)
            raise ValueError(f"{names} missing from the model config: it is not a DMS checkpoint's")
        values = {item.name: dms[_KEYS[item.name]] for item in fields(cls) if _KEYS[item.name] in dms}
        return cls(**{**values, "predictor": _predictor(dms)})

    def to_entries(self) -> dict[str, Any]:
        """Return the config.json keys that `from_entries` reads back to this object."""
        left_out = set(LATER_FIELDS) - set(self._changed_later_fields())
        left_out |= set() if self.method == "merge" else set(MERGING_FIELDS)
        return {key: getattr(self, name) for key, name in _FIELDS.items() if name not in left_out}


def _predictor(dms: Mapping[str, Any]) -> str:
    """Return the predictor that `dms_predictor` and NVIDIA's older `dms_separate_alpha` agree on."""
    separate = dms.get("dms_separate_alpha")
    if separate is not None and not isinstance(separate, bool):
        raise ValueError(f"dms_separate_alpha is {separate!r}, expected true or false")
    predictor = dms.get("dms_predictor")
    if predictor is None:
        return "linear" if separate else "query_channel"
    if separate is not None and separate != (predictor == "linear"):
        raise ValueError(
            f"dms_predictor is {predictor!r} but dms_separate_alpha is {separate}: true goes with the linear "
            "predictor and with no other; correct one of the two"
        )
    return predictor


def _is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN
