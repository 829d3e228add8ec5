"""The file with all metrics, the W&B run that a job resumes, and the line that names the optimizer."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dms.formats.megatron_folder import TRACKER
from megatron_dms.training.metrics import optimizer_text
from megatron_dms.training.run_log import MetricsFile, MirroringWriter, open_run_log

OURS = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines as strict JSON, without their times."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    return lines


def test_one_line_per_step_at_any_time(tmp_path: Path) -> None:
    """Logs a tensor, a validation at the same step, and a number that is not finite. Catches: a line that
    is written only when its step is over (a crash would lose it), two lines of a step, NaN in JSON, a step
    counted in samples."""
    path = tmp_path / "new" / "metrics.jsonl"
    writer = MirroringWriter(MetricsFile(path, 0), None)
    writer.add_scalar("loss", torch.tensor(1.5), 1)
    assert read(path) == [{"step": 1, "loss": 1.5}]
    writer.add_scalar("loss vs samples", 1.5, 64)
    writer.add_scalar("loss", float("nan"), 2)
    writer.add_scalar("KL validation", -1e-12, 2)
    writer.add_scalar("KL validation", 1, 2)  # a shorter line than before
    assert read(path) == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None, "KL validation": 1.0}]


def test_resuming_drops_what_came_after(tmp_path: Path) -> None:
    """Catches: a torn line kept, or the lines up to the step dropped; a first line that is taken for the last
    one's continuation; a finished run's last line lost as it is validated again; old lines that stay where a
    checkpoint turned out damaged and an older one was resumed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "time": 2e9}\n{"step": 4, "time": 2e9}\n{"step": 6, "time": 2e9}\n{"step": 8, "ti'
    )
    mirror = MetricsFile(path, 4)
    assert mirror.dropped == 6 and [line["step"] for line in read(path)] == [2, 4]
    mirror.add("loss", 0.5, 5)
    assert read(path)[1:] == [{"step": 4}, {"step": 5, "loss": 0.5}]
    mirror = MetricsFile(path, 5)
    assert mirror.dropped is None and len(read(path)) == 3
    mirror.add("KL validation", 1.0, 5)
    assert read(path)[2:] == [{"step": 5, "loss": 0.5, "KL validation": 1.0}]
    mirror.add("loss", 0.25, 4)
    assert read(path) == [{"step": 2}, {"step": 4, "loss": 0.25}]
    mirror.add("loss", 0.125, 5)
    assert MetricsFile(path, 0).dropped == 5 and not read(path)


def test_all_else_is_tensorboards(tmp_path: Path) -> None:
    """Catches: a figure that is lost, and a call that fails where there is no TensorBoard."""
    calls = []
    board = SimpleNamespace(
        add_scalar=lambda *words: calls.append(words), add_figure=lambda *words: calls.append(words)
    )
    mirror = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for writer in (MirroringWriter(mirror, board), MirroringWriter(mirror, None)):
        writer.add_scalar("loss", 1.0, 1)
        writer.add_figure("kept", "figure", 1)
    assert calls == [("loss", 1.0, 1), ("kept", "figure", 1)]
    writer.flush()
    with pytest.raises(AttributeError, match="has no no_add"):
        writer.no_add  # noqa: B018


def chosen(monkeypatch: pytest.MonkeyPatch, save: Path, step: int, **user: str) -> dict[str, str]:
    """Return W&B's environment after the start of a job."""
    for name in OURS:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    args = Namespace(
        rank=1,
        world_size=2,
        save=str(save),
        tensorboard_dir=None,
        wandb_project="p",
        wandb_entity="",
        wandb_save_dir="",
    )
    assert open_run_log(args, step) is not None
    assert open_run_log(Namespace(**vars(args) | {"rank": 0}), step) is None
    return {name: os.environ[name] for name in OURS if name in os.environ}


def log(save: Path, *steps: int) -> None:
    (save / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "time": 2e9}}\n' for step in steps))


def test_all_jobs_log_into_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches: an id that is not kept, a run that is rewound where nothing was logged beyond the step, or not
    where there was; the user's own settings overruled; a new retrofit in an old one's run."""
    first = chosen(monkeypatch, tmp_path, 0)
    run = (tmp_path / "wandb_run_id").read_text().strip()
    assert first == {"WANDB_RUN_ID": run} and len(run) == 8
    assert chosen(monkeypatch, tmp_path, 0) == first  # ended before its first checkpoint
    log(tmp_path, 99, 100)
    assert chosen(monkeypatch, tmp_path, 100) == {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    log(tmp_path, 99, 100, 101)
    rewound = {"WANDB_RUN_ID": run, "WANDB_RESUME_FROM": f"{run}?_step=100"}
    assert chosen(monkeypatch, tmp_path, 100) == rewound
    theirs = {"WANDB_RUN_ID": "theirs", "WANDB_RESUME": "must"}
    assert chosen(monkeypatch, tmp_path, 90, **theirs) == theirs
    assert chosen(monkeypatch, tmp_path, 100)["WANDB_RUN_ID"] == "theirs"
    (tmp_path / TRACKER).write_text("100")
    assert chosen(monkeypatch, tmp_path, 0)["WANDB_RUN_ID"] not in ("theirs", run)


@pytest.mark.parametrize("can", [True, False])
def test_a_server_rewinds_or_training_goes_on(
    can: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Runs online, with a stand-in for wandb. Catches: a server without rewinding that ends the job."""
    calls: list[Any] = []

    class Error(Exception):
        pass

    def init(**settings: Any) -> Any:
        calls.append(settings["resume_from"])
        if not can:
            raise Error("rewinding is not enabled")
        return SimpleNamespace(finish=lambda: calls.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    (tmp_path / "wandb_run_id").write_text("abc\n")
    log(tmp_path, 7, 8)
    assert chosen(monkeypatch, tmp_path, 7, WANDB_MODE="online") == {
        "WANDB_RUN_ID": "abc",
        "WANDB_RESUME": "allow",
    }
    assert calls == (["abc?_step=7", "finished"] if can else ["abc?_step=7"])
    assert ("did not rewind to abc?_step=7" in capsys.readouterr().err) is not can


def test_the_optimizer_is_named() -> None:
    """Catches: Megatron's class named instead of the one inside, chained ones forgotten."""
    fused = type("FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers.fused_adam"})
    parts = [Namespace(optimizer=fused()), Namespace(optimizer=fused())]
    assert optimizer_text(Namespace(chained_optimizers=parts)) == " optimizer: transformer_engine's FusedAdam"
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer_text(Namespace(optimizer=adam)) == " optimizer: torch's AdamW"
