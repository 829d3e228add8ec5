"""DMS settings of an exported checkpoint: the `dms_*` keys of its config.json, typed and checked.

The keys are the ones NVIDIA's DMS checkpoints use, plus `dms_predictor` and `dms_lag`, which name what that
format leaves implicit. Imports nothing outside the standard library, so a converter can check a config
without torch. (This file is copied flat into every exported checkpoint: relative imports only.)
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREDICTORS = ("query_channel", "linear", "key_channel")
GRANULARITIES = ("head", "layer")
METHODS = ("evict", "merge")

# Written by NVIDIA's exporter for its own runtime: how, never what, is computed.
OTHER_RUNTIME_KEYS = frozenset(
    {
        "dms_paged_attention_block_size",
        "dms_chunked_prefill",
        "dms_preallocate_for_tokens",
        "dms_compile_limit",
        "dms_manual_inference_mode",
    }
)
KNOWN_KEYS = frozenset(
    {
        "dms_alpha_scale",
        "dms_initial_alpha_offset",
        "dms_window_size",
        "dms_separate_alpha",
        "dms_alpha_per",
        "dms_tau",
        "dms_cr",
        "dms_disable_eviction",
        "dms_predictor",
        "dms_lag",
        "dms_method",
        "dms_importance_scale",
        "dms_importance_offset",
    }
)
# Without these nobody can tell what the model does; the others have a default in every format.
NEEDED_KEYS = ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset")


@dataclass(frozen=True)
class DMSSettings:
    """How one exported model decides what to forget. Construction raises ValueError on any bad value."""

    predictor: str
    """Where the eviction logit comes from: "query_channel", "linear" or "key_channel" (paper, section
    3.2)."""
    granularity: str
    """"head": each KV head decides for itself; "layer": KV head 0 decides for all heads of its layer."""
    window: int
    """w, in tokens: a marked pair stays readable for queries at a distance of at most w."""
    lag: int = 1
    """Pair j's decision is read from token j + lag, in tokens."""
    alpha_scale: float = 100.0
    """Factor on the raw predictor output; z = alpha_scale * raw - alpha_offset."""
    alpha_offset: float = 5.0
    """Subtracted from the logit, so that an untrained predictor evicts nothing."""
    temperature: float = 0.1
    """tau of the training-time relaxation. For the reader only: inference takes 1[z > 0]."""
    target_cr: float | None = None
    """Compression ratio the checkpoint was trained to. For the reader only."""
    disable_eviction: bool = False
    """Keep every pair (for comparison). The borrowed channel stays out of attention all the same."""

    method: str = "evict"
    """What becomes of a marked pair: "evict", or "merge" it into the one before (DMC, for comparison: see
    megatron_dms/inference/dmc_model.py, which alone runs such a model)."""
    importance_scale: float = 1.0
    """"merge": a pair's weight in the mean is sigmoid(importance_scale * raw - importance_offset)."""
    importance_offset: float = 0.0
    """See importance_scale."""

    def __post_init__(self) -> None:
        _expect_choice("dms_method", self.method, METHODS)
        _expect_choice("dms_predictor", self.predictor, PREDICTORS)
        _expect_choice("dms_alpha_per", self.granularity, GRANULARITIES)
        _expect_int("dms_window_size", self.window)
        _expect_int("dms_lag", self.lag)
        if self.lag > self.window + 1:
            raise ValueError(
                f"dms_lag is {self.lag} and dms_window_size is {self.window}: a decision must be known when "
                f"its pair leaves the window, so dms_lag must be at most window + 1 = {self.window + 1}"
            )
        _expect_number("dms_alpha_scale", self.alpha_scale)
        _expect_number("dms_initial_alpha_offset", self.alpha_offset)
        _expect_number("dms_tau", self.temperature, above=0.0)
        _expect_number("dms_importance_scale", self.importance_scale, above=0.0)
        _expect_number("dms_importance_offset", self.importance_offset)
        found = (self.predictor, self.granularity, self.window, self.lag)
        if self.method == "merge" and found != ("key_channel", "head", 0, 1):
            raise ValueError(
                f"dms_method is 'merge' with (dms_predictor, dms_alpha_per, dms_window_size, dms_lag) = "
                f"{found}, expected ('key_channel', 'head', 0, 1), for which alone merging is defined"
            )
        for name in ("importance_scale", "importance_offset"):
            value = getattr(self, name)
            if self.method != "merge" and value != getattr(type(self), name):
                raise ValueError(
                    f"dms_{name} is {value} with dms_method {self.method!r}: only 'merge' weighs pairs; "
                    "remove it"
                )
        if self.target_cr is not None:
            _expect_number("dms_cr", self.target_cr)
            if self.target_cr < 1:
                raise ValueError(f"dms_cr is {self.target_cr}, expected null or a ratio of at least 1")
        if not isinstance(self.disable_eviction, bool):
            raise ValueError(f"dms_disable_eviction is {self.disable_eviction!r}, expected true or false")

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
        return cls(
            predictor=_predictor(dms),
            granularity=dms.get("dms_alpha_per", "head"),
            window=dms["dms_window_size"],
            lag=dms.get("dms_lag", cls.lag),
            alpha_scale=dms["dms_alpha_scale"],
            alpha_offset=dms["dms_initial_alpha_offset"],
            temperature=dms.get("dms_tau", cls.temperature),
            target_cr=dms.get("dms_cr"),
            disable_eviction=dms.get("dms_disable_eviction", cls.disable_eviction),
            method=dms.get("dms_method", cls.method),
            importance_scale=dms.get("dms_importance_scale", cls.importance_scale),
            importance_offset=dms.get("dms_importance_offset", cls.importance_offset),
        )

    def to_entries(self) -> dict[str, Any]:
        """The config.json keys that `from_entries` reads back to this object."""
        merging = {
            "dms_method": self.method,
            "dms_importance_scale": self.importance_scale,
            "dms_importance_offset": self.importance_offset,
        }
        return {
            "dms_predictor": self.predictor,
            "dms_separate_alpha": self.predictor == "linear",
            "dms_alpha_per": self.granularity,
            "dms_window_size": self.window,
            "dms_lag": self.lag,
            "dms_alpha_scale": self.alpha_scale,
            "dms_initial_alpha_offset": self.alpha_offset,
            "dms_tau": self.temperature,
            "dms_cr": self.target_cr,
            "dms_disable_eviction": self.disable_eviction,
            **(merging if self.method == "merge" else {}),
        }


def _predictor(dms: Mapping[str, Any]) -> str:
    """The predictor that `dms_predictor` and NVIDIA's older `dms_separate_alpha` agree on."""
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


def _expect_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}, expected one of {list(choices)}")


def _expect_int(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, expected an integer >= 0 (in tokens)")


def _expect_number(key: str, value: Any, above: float = -math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not above < value < math.inf or abs(value) > sys.float_info.max:
        bound = "" if above == -math.inf else f" above {above}"
        raise ValueError(f"{key} is {str(value)[:80]}, expected a finite number{bound}")
