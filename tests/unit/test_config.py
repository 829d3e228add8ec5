"""DMSConfig and its flags: every check names the flag, what it found and what it expected, in one line."""

import argparse
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from megatron_dms.arguments import add_dms_arguments, destination, dms_config_from_args
from megatron_dms.compression_method import EVICTION, MERGING, method_of
from megatron_dms.config import DMSConfig, flag_of
from megatron_dms.errors import CheckpointError

# A value other than the default for every field, all valid together.
OTHER: dict[str, Any] = {
    "predictor": "linear",
    "granularity": "layer",
    "alpha_scale": 50.0,
    "alpha_offset": 2.5,
    "window": 16,
    "lag": 0,
    "zeroing": "around_rope",  # the linear predictor has no other, see test_zeroing_before_rope_only
    "temperature": 0.5,
    "final_cr": 4.0,
    "steps_per_cr": 12.5,
    "anneal": "fraction",
    "compression_weight": 0.25,
    "kl": "student_teacher",
    "zeroing_steps": 0,  # the linear predictor has none, see test_zeroing_steps_from_the_command_line
    "train": "predictor",
    "teacher": "self",
    "kl_temperature": 2.0,
    "fuse_output_layer": True,
    "attention_backend": "triton",
    "attention_threshold": -25.0,
    "keep_checkpoints": 3,
    "resume_on_other_samples": True,
    **{"start_limit": 60.0, "step_limit": 30.0, "save_limit": 0.0, "heartbeat_limit": 15.0},
    "method": "evict",  # merging goes with one set of these settings, see test_merging_from_the_command_line
    "importance_scale": 1.0,
    "importance_offset": 0.0,
}
DEFAULT_IN_OTHER = {"zeroing_steps", "zeroing", "method", "importance_scale", "importance_offset"}
MERGE = {
    **{"method": "merge", "predictor": "key_channel", "window": 0},
    **{"importance_scale": 2.0, "importance_offset": 0.5},
}
RUN_FIELDS = {"attention_backend", "attention_threshold", "fuse_output_layer", "keep_checkpoints"}
RUN_FIELDS |= {"resume_on_other_samples"}
RUN_FIELDS |= {"start_limit", "step_limit", "save_limit", "heartbeat_limit"}
MODEL_FIELDS = {"predictor", "granularity", "alpha_scale", "alpha_offset", "window", "lag", "temperature"}
MODEL_FIELDS |= {"zeroing"}
MODEL_FIELDS |= {"method", "importance_scale", "importance_offset"}


def parser() -> argparse.ArgumentParser:
    return add_dms_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_the_defaults() -> None:
    """The defaults are the paper's settings. Catches: a default changed in passing, which would change
    every run."""
    assert asdict(DMSConfig()) == {
        **{"predictor": "query_channel", "granularity": "head", "alpha_scale": 100.0, "alpha_offset": 5.0},
        **{
            "window": 256,
            "lag": 1,
            "zeroing": "around_rope",
            "temperature": 0.1,
            "final_cr": 8.0,
            "steps_per_cr": 100.0,
        },
        **{"anneal": "cr", "compression_weight": 1.0, "kl": "teacher_student", "zeroing_steps": 0},
        **{"train": "all", "teacher": None, "kl_temperature": 1.0},
        **{"fuse_output_layer": False, "attention_backend": "auto", "attention_threshold": -40.0},
        **{"method": "evict", "importance_scale": 1.0, "importance_offset": 0.0},
        **{"keep_checkpoints": 0, "resume_on_other_samples": False},
        **{"start_limit": 1800.0, "step_limit": 480.0, "save_limit": 1800.0, "heartbeat_limit": 120.0},
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("predictor", "query", "'query', expected one of query_channel, key_channel, linear"),
        ("granularity", "model", "'model', expected one of head, layer"),
        ("anneal", "cosine", "'cosine', expected one of cr, fraction"),
        ("kl", "forward", "'forward', expected one of teacher_student, student_teacher"),
        ("train", "none", "'none', expected one of all, predictor"),
        ("window", -1, "-1, expected >= 0 tokens"),
        ("lag", -1, "-1, expected between 0 and window + 1 = 257"),
        ("lag", 258, "258, expected between 0 and window + 1 = 257"),
        ("temperature", 0.0, "0.0, expected > 0"),
        ("temperature", -0.1, "-0.1, expected > 0"),
        ("alpha_scale", 0.0, "0.0, expected > 0"),
        ("final_cr", 0.5, "0.5, expected >= 1"),
        ("steps_per_cr", 0.0, "0.0, expected > 0 steps"),
        ("compression_weight", -1.0, "-1.0, expected >= 0"),
        ("zeroing_steps", -1, "-1, expected >= 0 steps"),
        ("kl_temperature", 0.0, "0.0, expected > 0"),
        ("attention_threshold", 0.0, "0.0, expected < 0"),
        ("importance_scale", 0.0, "0.0, expected > 0"),
        ("keep_checkpoints", -1, "-1, expected >= 0 (0 = all)"),
        ("step_limit", -1.0, "-1.0, expected >= 0 seconds"),
        ("method", "pool", "'pool', expected one of evict, merge"),
        ("attention_backend", "fast", "'fast', expected one of auto, dense, flash, flex, triton"),
    ],
)
def test_each_check(name: str, value: object, expected: str) -> None:
    """Catches: a check that is missing, lets the first bad value through, or names another flag."""
    with pytest.raises(ValueError) as error:
        DMSConfig(**{name: value})
    assert str(error.value).startswith(f"--dms-{name.replace('_', '-')} is {expected}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha_scale", float("inf")), ("alpha_offset", float("nan")), ("final_cr", float("inf"))]
    + [("steps_per_cr", float("inf")), ("compression_weight", float("inf")), ("temperature", float("nan"))],
)
def test_numbers_must_be_finite(name: str, value: float) -> None:
    """`--dms-final-cr inf` parses as a number. Catches: a run whose targets or losses are NaN."""
    with pytest.raises(ValueError, match=flag_of(name)):
        DMSConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 0), ("final_cr", 1.0), ("compression_weight", 0.0), ("alpha_offset", -3.0), ("lag", 257)],
)
def test_the_least_valid_values(name: str, value: float) -> None:
    """Catches: a check that is too strict. A window of 0 with lag 1 is one of them."""
    assert getattr(DMSConfig(**{name: value}), name) == value
    assert DMSConfig(window=0, lag=1).lag == 1


def test_immediate_eviction_is_allowed() -> None:
    """lag = window is the paper's ablation. Catches: an upper bound on the lag below the window."""
    assert DMSConfig(window=16, lag=16).lag == 16


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"predictor": "linear", "zeroing_steps": 9},
            ("--dms-predictor linear", "--dms-zeroing-steps 9", "use --dms-zeroing-steps 0"),
        ),
        (
            {"predictor": "linear", "teacher": "self"},
            ("--dms-teacher self", "--dms-train all", "use --dms-predictor linear --dms-train predictor"),
        ),
        (
            {"predictor": "query_channel", "teacher": "self", "train": "predictor"},
            ("--dms-teacher self", "--dms-predictor query_channel", "or name a teacher checkpoint"),
        ),
        (
            {"predictor": "key_channel", "teacher": "self", "train": "predictor"},
            ("--dms-teacher self", "--dms-predictor key_channel"),
        ),
        (
            {"attention_backend": "flash", "attention_threshold": -20.0},
            ("--dms-attention-threshold -20.0", "--dms-attention-backend flash", "drop it"),
        ),
        (MERGE | {"predictor": "linear"}, ("--dms-method merge", "--dms-predictor key_channel only")),
        (MERGE | {"granularity": "layer"}, ("--dms-method merge", "--dms-granularity head only")),
        (MERGE | {"window": 16}, ("--dms-method merge with --dms-window 16", "--dms-window 0 only")),
        (MERGE | {"lag": 0}, ("--dms-method merge", "--dms-lag 1 only")),
        ({"importance_scale": 2.0}, ("--dms-importance-scale 2.0", "--dms-method evict", "drop it")),
        ({"importance_offset": 1.0}, ("--dms-importance-offset 1.0", "--dms-method evict", "drop it")),
    ],
)
def test_contradictions(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Catches: two settings of which one would be ignored, or a teacher that changes under the student."""
    with pytest.raises(ValueError) as error:
        DMSConfig(**settings)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_one_flag_for_each_field() -> None:
    """Catches: a field without a flag, a flag without a field, two names for one, a default told twice."""
    actions = {
        option: action for action in parser()._actions for option in action.option_strings if "dms" in option
    }
    assert set(actions) == {flag_of(item.name) for item in fields(DMSConfig)}
    for item in fields(DMSConfig):
        action = actions[flag_of(item.name)]
        assert action.dest == destination(item.name) and action.default == item.default
        assert action.choices == item.metadata["choices"]
    assert flag_of("steps_per_cr") == "--dms-steps-per-cr"


def test_every_field_can_be_set_from_the_command_line() -> None:
    """Catches: a flag that is accepted and ignored, a number that stays a string."""
    words = [
        word
        for name, value in OTHER.items()
        for word in ((flag_of(name),) if value is True else (flag_of(name), str(value)))
    ]
    found = dms_config_from_args(parser().parse_args(words))
    assert asdict(found) == OTHER and OTHER.keys() == {item.name for item in fields(DMSConfig)}
    for item in fields(DMSConfig):
        value = getattr(found, item.name)
        assert type(value) is type(OTHER[item.name])
        assert value != item.default or item.name in DEFAULT_IN_OTHER
    assert dms_config_from_args(parser().parse_args([])) == DMSConfig()


def test_zeroing_steps_from_the_command_line() -> None:
    """Catches: a flag that is accepted and ignored."""
    assert dms_config_from_args(parser().parse_args(["--dms-zeroing-steps", "40"])).zeroing_steps == 40


def test_merging_from_the_command_line() -> None:
    """Catches: a flag that is accepted and ignored; merging that no set of flags can ask for."""
    words = [word for name, value in MERGE.items() for word in (flag_of(name), str(value))]
    assert dms_config_from_args(parser().parse_args(words)) == DMSConfig(**MERGE)
    assert DMSConfig(**MERGE).compression_method is MERGING
    assert DMSConfig().compression_method is EVICTION


def test_the_method_of_a_checkpoint() -> None:
    """Catches: a checkpoint from before there was a choice that is refused; an unknown method taken for
    eviction, so that an export would evict what training did something else with."""
    assert method_of({}) is EVICTION and method_of({"method": "merge"}) is MERGING
    with pytest.raises(CheckpointError, match="says method 'drop', expected one of evict, merge"):
        method_of({"method": "drop"})


def test_help_tells_meaning_and_default() -> None:
    """Catches: a field without an explanation, a default in the text that is not the default."""
    text = " ".join(parser().format_help().split())
    for item in fields(DMSConfig):
        assert len(item.metadata["help"]) > 20
        assert (
            f"{item.metadata['help']} (default: {item.default or (item.default == 0 and item.default)})"
            in (text)
            or (item.default is None and f"{item.metadata['help']} (default: none)" in text)
        ), item.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dms-window", "many"], "argument --dms-window: invalid int value: 'many'"),
        (["--dms-window", "2.5"], "argument --dms-window: invalid int value: '2.5'"),
        (["--dms-final-cr", "x"], "argument --dms-final-cr: invalid float value: 'x'"),
        (["--dms-kl", "forward"], "argument --dms-kl: invalid choice: 'forward'"),
    ],
)
def test_flags_refuse_other_types(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    """Catches: a field whose flag takes any text."""
    with pytest.raises(SystemExit):
        parser().parse_args(words)
    assert message in capsys.readouterr().err


def test_what_a_checkpoint_stores_comes_back() -> None:
    """Catches: a field that is lost on its way, an unknown one dropped in silence."""
    for config in (DMSConfig(), DMSConfig(**OTHER)):
        assert DMSConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown DMS settings \['block_size'\].*newer version"):
        DMSConfig.from_dict({"window": 3, "block_size": 256})


def test_the_fade_of_a_borrowed_channel() -> None:
    """max(0, 1 - step / (0.8 zeroing_steps)). Catches: a fade over the whole phase, one that starts below 1
    or goes below 0."""
    config = DMSConfig(zeroing_steps=100)
    assert [config.fade(step) for step in (0, 20, 40, 80, 99)] == pytest.approx([1, 0.75, 0.5, 0, 0])


def test_the_schedule_has_the_settings() -> None:
    """Catches: two settings handed over in the wrong order."""
    schedule = DMSConfig(final_cr=4.0, steps_per_cr=12.5, anneal="fraction").schedule
    assert (schedule.final_cr, schedule.steps_per_cr, schedule.anneal) == (4.0, 12.5, "fraction")


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"teacher"}))
@pytest.mark.parametrize("resuming", [True, False])
def test_against_a_checkpoint(name: str, resuming: bool) -> None:
    """Resuming, all must agree but the place of the teacher and how things are computed; starting anew,
    what the model means nothing without. Catches: a field left out of the comparison, a schedule that may not
    be changed by --finetune, a back-end that may not change."""
    config = DMSConfig()
    other = ({"zeroing_steps": 7, "zeroing": "before_rope"} | MERGE if name in DEFAULT_IN_OTHER else OTHER)[
        name
    ]
    stored = config.to_dict() | {name: other}
    if name in RUN_FIELDS or (not resuming and name not in MODEL_FIELDS):
        config.check_against(stored, resuming)
        return
    with pytest.raises(ValueError) as error:
        config.check_against(stored, resuming)
    message = str(error.value)
    assert message.startswith(
        f"{flag_of(name)} is {getattr(config, name)}, but the checkpoint was trained with "
    )
    assert f"with {other}; use {flag_of(name)} {other}" in message and "\n" not in message
    assert ("--finetune" in message) == (name not in MODEL_FIELDS)


@pytest.mark.parametrize("resuming", [True, False])
def test_what_need_not_agree_with_a_checkpoint(resuming: bool) -> None:
    """Catches: a teacher that may not move, and keys compared that the checkpoint lacks (as one imported from
    NVIDIA's format does)."""
    config = replace(DMSConfig(), teacher="here")
    config.check_against(config.to_dict() | {"teacher": "there"}, resuming)
    config.check_against({"window": config.window}, resuming)
    config.check_against({}, resuming)


def test_a_checkpoint_that_does_not_say_what_it_does_evicts() -> None:
    """Catches: a checkpoint from before there was merging, of which a run makes a merged one in silence."""
    with pytest.raises(ValueError, match=r"--dms-method is merge, .* with evict"):
        DMSConfig(**MERGE).check_against({"window": 0}, resuming=True)


def test_zeroing_before_rope_only() -> None:
    """Catches: the setting ignored on the command line, taken for a predictor that borrows no channel, not
    compared with a checkpoint that leaves it out (which then means around RoPE)."""
    found = dms_config_from_args(parser().parse_args(["--dms-zeroing", "before_rope", "--dms-lag", "0"]))
    assert (found.zeroing, found.lag) == ("before_rope", 0)
    with pytest.raises(ValueError, match="--dms-zeroing is 'before_rope' with the linear predictor"):
        DMSConfig(zeroing="before_rope", predictor="linear")
    with pytest.raises(ValueError, match="--dms-zeroing is before_rope, but the checkpoint was trained with"):
        found.check_against({"lag": 0}, resuming=False)
    with pytest.raises(ValueError, match=r"--dms-zeroing is around_rope, .* use --dms-zeroing before_rope"):
        DMSConfig(lag=0).check_against({"lag": 0, "zeroing": "before_rope"}, resuming=False)
