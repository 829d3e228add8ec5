"""Mistakes on the command line, in checkpoints and in data give one line each, before anything is built.

Imports of Megatron take seconds, so most cases go through one process. It calls what pretrain_dms.py
calls, and collects each message.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_dms.errors import StartupError
from megatron_dms.training import startup
from megatron_dms.training.startup import parse_dms_flags
from tests.support.tools import ROOT, run_python

VOCAB, POSITIONS, HEADS, GROUPS, LAYERS = 131, 64, 4, 2, 4  # of tests/support/retrofit.py
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dms-windw 3", "unknown flag --dms-windw; did you mean --dms-window?"),
        ("--dms-cr=4", "unknown flag --dms-cr; "),
        ("--dms-final 4", "unknown flag --dms-final; did you mean --dms-final-cr?"),  # no abbreviations
        ("--dms_xyz_0123456789", "unknown flag --dms_xyz_0123456789; known: --dms-method, "),
        ("--dms-window -1", "--dms-window is -1, expected >= 0 tokens"),
        ("--dms-final-cr 0.5", "--dms-final-cr is 0.5, expected >= 1"),
        ("--dms-temperature 0", "--dms-temperature is 0.0, expected > 0"),
        ("--dms-window x", "argument --dms-window: invalid int value: 'x'"),
        ("--dms-window", "argument --dms-window: expected one argument"),
        ("--dms-kl forward", "argument --dms-kl: invalid choice: 'forward'"),
        ("--dms-predictor linear --dms-zeroing-steps 9", "use --dms-zeroing-steps 0"),
        ("--dms-predictor linear --dms-teacher self", "--dms-train all: the student's own weights"),
        (
            "--dms-teacher self --dms-train predictor",
            "--dms-predictor query_channel and --dms-train predictor",
        ),
    ],
)
def test_dms_flags(flags: str, message: str) -> None:
    """Catches: a check that is missing, an unknown flag dropped in silence or left to Megatron, a message of
    several lines."""
    with pytest.raises(StartupError) as error:
        parse_dms_flags(["--lr", "1e-4", *flags.split(), "--train-iters", "5"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_flags_are_left_to_megatron() -> None:
    """Catches: a first check that refuses Megatron's own flags, or the values behind them."""
    words = "--lr 1e-4 --dms-window 9 --data-path --bf16 --save my--dms-folder"
    assert parse_dms_flags(words.split()).window == 9


# The start-up of pretrain_dms.py, for many command lines in one process. The last,
# "good", has no mistake; what its model would be like is printed beside the messages.
COLLECT = """
import contextlib, io, json, sys
from megatron_dms.errors import StartupError
from megatron_dms.training.startup import check, open_outputs, parse
found = {}
for name, words in json.load(open(sys.argv[1])).items():
    sys.argv[1:], said = words, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            open_outputs(check(parse()))
        found[name] = "nothing was wrong"
    except StartupError as error:
        found[name] = f"{error}{said.getvalue()}"
    except BaseException as error:
        found[name] = f"{type(error).__name__} (not a StartupError): {error}"
    if name == "good":
        from megatron.training import get_args
        from megatron.training.argument_utils import gpt_config_from_args
        model = gpt_config_from_args(get_args())
        plain = (int, float, str, bool)
        from megatron_dms.training import checks
        found["names unknown"] = [n for n in checks._UNSUPPORTED if not hasattr(get_args(), n)]
        values = vars(model.transformer) | {"rotary_base": model.rotary_base, "vocab_size": model.vocab_size}
        found["model"] = {key: value for key, value in values.items() if isinstance(value, plain)}
    with contextlib.suppress(Exception):  # whatever an accepted command line has set
        from megatron.core import num_microbatches_calculator
        from megatron.training import global_vars
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
print(json.dumps(found))
"""


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def copy_with_config(hf: Path, folder: Path, **changes: object) -> None:
    """Copy a HF folder, with other values in its config.json."""
    shutil.copytree(hf, folder)
    config = json.loads((hf / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


class Folders:
    """A good base checkpoint and data set, and damaged copies of both."""

    def __init__(self, root: Path) -> None:
        from megatron_dms.conversion import import_hf
        from tests.support.retrofit import Workspace, make_base, make_data, save_qwen3

        self.root = root
        good = Workspace(root)
        make_base(good)
        make_data(good)
        self.base, self.data = good.base, good.data
        save_qwen3(root / "other_vocabulary", vocab_size=VOCAB + 9)

        shutil.copytree(good.base, root / "truncated")
        cut(max(root.glob("truncated/*/*.distcp"), key=lambda path: path.stat().st_size), 0.5)
        shutil.copytree(good.base, root / "half_written")
        (root / "half_written" / TRACKER).unlink()
        shutil.copytree(good.base, root / "no_metadata")
        next(root.glob("no_metadata/*/.metadata")).unlink()

        settings = {"dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": 512}
        settings |= {"dms_separate_alpha": False, "dms_alpha_per": "head", "dms_tau": 0.1, "dms_cr": 8}
        copy_with_config(good.hf, root / "hf_dms", **settings)
        import_hf(root / "hf_dms", root / "dms")
        for name, source in (("resumed", root / "dms"), ("resumed_dense", good.base)):
            shutil.copytree(source, root / name)  # as if training had saved it
            (root / name / "release").rename(root / name / "iter_0000005")
            (root / name / TRACKER).write_text("5")

        for name in ("short", "garbage"):
            for file in root.glob("data*"):
                shutil.copy(file, root / file.name.replace("data", name, 1))
        cut(root / "short.bin", 0.5)
        (root / "garbage.idx").write_bytes(b"not an index at all" * 20)

    def words(self, flags: str) -> list[str]:
        """Return a good command line with `flags` behind it (the last value of a flag counts); {root} is
        filled in."""
        good = (
            "--seq-length 50 --train-iters 5 --lr 3e-4 --micro-batch-size 2 --global-batch-size 4 "
            f"--eval-iters 0 --dms-window 7 --save-interval 5 --save {self.root}/save"
        ).split()
        given = flags.format(root=self.root).split()
        for flag, value in (
            ("--pretrained-checkpoint", self.base),
            ("--train-data-path", self.data),
            ("--dms-teacher", self.base),
        ):
            if f"no{flag}" in given:
                given.remove(f"no{flag}")
            elif flag not in given:
                good += [flag, str(value)]
        return good + given


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("startup"))


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no teacher": ("no--dms-teacher", ("no teacher: give --dms-teacher DIR",)),
    "two starting points": (
        "--load-hf {root}/hf",
        ("--load-hf {root}/hf and --pretrained-checkpoint", "starts from one of them", "drop the other"),
    ),
    "a HF folder that is not there": (
        "no--pretrained-checkpoint --load-hf {root}/nowhere",
        ("{root}/nowhere is no folder", "expected a local HF checkpoint"),
    ),
    "a Megatron folder for a HF folder": (
        "no--pretrained-checkpoint --load-hf {root}/base",
        ("{root}/base/config.json is missing",),
    ),
    "a HF folder of a DMS model with other settings": (
        "no--pretrained-checkpoint --load-hf {root}/hf_dms",
        ("--dms-window is 7", "trained with 512", "use --dms-window 512", "{root}/hf_dms"),
    ),
    "a teacher that is not there": (
        "--dms-teacher {root}/nowhere",
        ("{root}/nowhere does not exist", "give"),
    ),
    "a teacher of another vocabulary": (
        "--dms-teacher {root}/other_vocabulary",
        ("{root}/other_vocabulary", f"vocabulary of {VOCAB + 9}", f"student has {VOCAB}", "same tokenizer"),
    ),
    "a DMS model as teacher": (
        "--dms-teacher {root}/dms",
        ("{root}/dms is a DMS model", "expected a dense one", "use its base model"),
    ),
    "more tokens than positions": (
        "--seq-length 65",
        ("--seq-length is 65", f"{POSITIONS} positions", "use a shorter --seq-length"),
    ),
    "no tokens": ("--seq-length -5", ("--seq-length is -5", "expected 1 or more")),
    "TP 0": ("--tensor-model-parallel-size 0", ("--tensor-model-parallel-size is 0", "expected 1 or more")),
    "PP below 1": ("--pipeline-model-parallel-size -1", ("parallel-size is -1", "1 or more")),
    "flex on CPU": ("--dms-attention-backend flex", ("flex needs CUDA to train", "use auto, dense or flash")),
    "triton on CPU": ("--dms-attention-backend triton", ("triton needs CUDA to train", "use auto, dense")),
    "TP that does not divide the heads": (
        "--tensor-model-parallel-size 3",
        ("--tensor-model-parallel-size is 3", f"num_attention_heads = {HEADS}", f"use a divisor of {HEADS}"),
    ),
    "TP above the KV heads": (
        "--tensor-model-parallel-size 4",
        ("--tensor-model-parallel-size is 4", f"num_query_groups = {GROUPS}", f"use a divisor of {GROUPS}"),
    ),
    "PP that does not divide the layers": (
        "--pipeline-model-parallel-size 3",
        ("--pipeline-model-parallel-size is 3", f"{LAYERS} layers", f"use a divisor of {LAYERS}"),
    ),
    "too few processes": ("--tensor-model-parallel-size 2", ("1 processes", "multiple of 2")),
    "no checkpoint named": (
        "no--pretrained-checkpoint",
        ("no checkpoint to start from", "--pretrained-checkpoint DIR", "tools/convert.py import"),
    ),
    "a missing checkpoint": (
        "--pretrained-checkpoint {root}/nowhere",
        ("{root}/nowhere", "latest_checkpointed_iteration.txt is missing", "tools/convert.py import"),
    ),
    "a half-written checkpoint": (
        "--pretrained-checkpoint {root}/half_written",
        ("{root}/half_written", "latest_checkpointed_iteration.txt is missing"),
    ),
    "a checkpoint without metadata": ("--pretrained-checkpoint {root}/no_metadata", (".metadata",)),
    "a truncated checkpoint": ("--pretrained-checkpoint {root}/truncated", (".distcp", "bytes")),
    "a truncated teacher": ("--dms-teacher {root}/truncated", (".distcp", "bytes")),
    "another window than the checkpoint's": (
        "--pretrained-checkpoint {root}/dms --dms-window 256",
        ("--dms-window is 256", "trained with 512", "use --dms-window 512"),
    ),
    "another predictor than the checkpoint's": (
        "--pretrained-checkpoint {root}/dms --dms-predictor key_channel --dms-window 512",
        ("--dms-predictor is key_channel", "trained with query_channel", "use --dms-predictor query_channel"),
    ),
    "another architecture than the checkpoint's": (
        "--num-layers 6",
        ("--num-layers is 6", f"the checkpoint has {LAYERS}", "leave the flag out"),
    ),
    "another vocabulary than the checkpoint's": (
        "--vocab-size 200",
        ("--vocab-size is 200", f"the checkpoint has {VOCAB}", "leave the flag out"),
    ),
    "another epsilon than the checkpoint's": (
        "--norm-epsilon 0.1",
        ("norm-epsilon is 0.1", "the checkpoint has 1e-06", "leave the flag out"),
    ),
    "resuming with another window": (
        "no--pretrained-checkpoint --load {root}/resumed --dms-window 256",
        ("--dms-window is 256", "trained with 512", "use --dms-window 512"),
    ),
    "resuming what was never retrofitted": (
        "no--pretrained-checkpoint --load {root}/resumed_dense",
        ("{root}/resumed_dense was trained without DMS", "add --finetune"),
    ),
    "a truncated .bin": ("--train-data-path {root}/short", ("{root}/short.bin", "bytes", "expected")),
    "a damaged .idx": (
        "--train-data-path {root}/garbage",
        ("{root}/garbage.idx", "at the start", "expected"),
    ),
    "data that is not there": ("--train-data-path {root}/nothing", ("{root}/nothing.idx", "no such file")),
    "weight decay on frozen rows": (
        "--dms-train predictor --weight-decay 0.1",
        ("--weight-decay is 0.1", "expected 0 with --dms-train predictor", "add --weight-decay 0"),
    ),
    "another RoPE": ("--rotary-interleaved", ("--rotary-interleaved is True", "another model")),
    "an uneven pipeline": (
        "--decoder-first-pipeline-num-layers 1",
        ("--decoder-first-pipeline-num-layers is 1", "expected None", "equally many layers"),
    ),
    "validation without data": ("--eval-iters 3", ("--eval-iters: found 3", "--valid-data-path")),
    "experts": ("--num-experts 4", ("--num-experts is 4", "expected None", "not supported")),
    "fp8": ("--fp8-format hybrid", ("--fp8-format is hybrid", "expected None", "use --bf16")),
    "dropout": ("--attention-dropout 0.1", ("--attention-dropout is 0.1", "expected 0.0")),
    "another exchange between context-parallel ranks": (
        "--cp-comm-type p2p",
        ("--cp-comm-type is ['p2p']", "expected ['a2a']"),
    ),
    "a sliding window of Megatron's": ("--window-size 5,0", ("--window-size is (5, 0)", "expected None")),
    "a layer spec of the user's": ("--spec some module", ("--spec is ['some', 'module']", "expected None")),
    "an unknown flag": ("--learning-rat 3", ("--learning-rat",)),
    "a flag without its value": ("--seed", ("argument --seed: expected one argument",)),
    "a value of the wrong type": ("--seed many", ("argument --seed: invalid int value: 'many'",)),
    "what Megatron itself refuses": (
        "--global-batch-size 5",
        ("Megatron refuses these flags: ", "must be divisible by"),
    ),
}


# Without torchrun's variables, pretrain_dms.py is a single process, which gets as far as the checks.
NO_RANKS = dict.fromkeys(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)


@pytest.fixture(scope="module")
def messages(folders: Folders) -> dict:
    """Return what each case says, and a description of the good case's model."""
    cases = folders.root / "cases.json"
    words = {name: folders.words(flags) for name, (flags, _) in CASES.items()}
    good = folders.words("")
    save = good.index("--save-interval")
    cases.write_text(
        json.dumps(words | {"good": good[:save] + good[save + 4 :]})
    )  # it would copy files there
    done = run_python("-W", "ignore", "-c", COLLECT, cases, cwd=folders.root, env=NO_RANKS, timeout=180)
    assert done.status == 0, done.error[-3000:]
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_line_names_found_expected_and_fix(name: str, messages: dict[str, str], folders: Folders) -> None:
    """Catches: a check that is missing (the run goes on), that comes after the process group, or whose
    error is not one line with all it should say."""
    message = messages[name]
    for part in CASES[name][1]:
        assert part.format(root=folders.root) in message, message
    assert "\n" not in message and "not a StartupError" not in message


@pytest.mark.slow
def test_the_model_is_the_checkpoints(messages: dict, folders: Folders) -> None:
    """The command line has no mistakes, and the model that Megatron builds has every number of the HF
    config. Catches: an argument that Megatron knows by another name, so that its own default is trained
    instead."""
    assert messages["good"] == "nothing was wrong"
    config = json.loads((folders.root / "hf" / "config.json").read_text())
    theirs = {
        **{"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "kv_channels": "head_dim"},
        **{"ffn_hidden_size": "intermediate_size", "num_attention_heads": "num_attention_heads"},
        **{"num_query_groups": "num_key_value_heads", "layernorm_epsilon": "rms_norm_eps"},
    }
    expected = {ours: config[name] for ours, name in theirs.items()}
    expected |= {"normalization": "RMSNorm", "qk_layernorm": True, "gated_linear_unit": True}
    expected |= {
        "add_qkv_bias": False,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    assert {name: messages["model"][name] for name in expected} == expected


@pytest.mark.slow
def test_nothing_is_left_behind(messages: dict[str, str], folders: Folders) -> None:
    """Catches: HF side files copied, or folders made, before the last check."""
    assert messages and not (folders.root / "save").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--dms-windw 3", "unknown flag --dms-windw; did you mean --dms-window?"),
        ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size is 3, but the model has"),
    ],
)
def test_the_command_itself(flags: str, start: str, folders: Folders, tmp_path: Path) -> None:
    """Runs the real entry script, with mistakes found before and after Megatron's import. Catches: a
    traceback, a second error line, exit status 0, a folder left behind."""
    words = folders.words(f"{flags} --save {tmp_path}/save")
    done = run_python(ROOT / "pretrain_dms.py", *words, cwd=folders.root, env=NO_RANKS)
    errors = [line for line in done.errors if "error" in line.lower()]
    assert done.status == 2, done.error[-2000:]
    assert len(errors) == 1 and errors[0].startswith(f"pretrain_dms.py: error: {start}"), done.error[-2000:]
    assert "Traceback" not in done.out + done.error
    assert not (tmp_path / "save").exists()


@pytest.mark.slow
def test_ranks_other_than_the_first_say_nothing(folders: Folders) -> None:
    """Catches: the same line from each of a thousand ranks."""
    script = "from megatron_dms import pretrain; pretrain.SILENT_RANKS_WAIT = 0; pretrain.main()"
    done = run_python("-c", script, "--dms-window", "-1", env=NO_RANKS | {"RANK": "1", "LOCAL_RANK": "1"})
    assert done.status == 2 and done.error == "" and done.out == ""


@pytest.mark.slow
def test_every_refused_name_is_megatrons(messages: dict) -> None:
    """Catches a name that is misspelt, or that a newer Megatron has renamed: it would refuse nothing."""
    assert messages["names unknown"] == []


def test_wandb_without_a_key_is_one_line() -> None:
    """Catches: a traceback, as W&B's errors have no type in common with those of Megatron's checks."""
    wandb = pytest.importorskip("wandb")
    with (
        pytest.raises(StartupError, match="W&B cannot be used: No API key configured; set WANDB_API_KEY"),
        startup._refusals_in_one_line(),
    ):
        raise wandb.errors.UsageError("No API key configured")
    with pytest.raises(KeyError), startup._refusals_in_one_line():
        raise KeyError("a fault of ours keeps its traceback")
