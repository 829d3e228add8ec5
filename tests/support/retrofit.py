"""Run the entry script in gloo processes on a tiny random model, and read what it logged."""

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.support.forking import ROOT, ForkServer
from tests.support.forking import one_thread as environment

SCRIPT = ROOT / "pretrain_dms.py"
VOCAB, SEQUENCE, WINDOW = 131, 50, 7  # odd on purpose; 131 is padded differently at TP 1 and TP 2
STEPS = 6
TIMEOUT = 240  # seconds for one run; through torchrun a run takes about 20 on an idle machine

# With these flags, decisions are a true mixture and noise decides many of them, so a test fails when the
# noise or a decision is wrong. Eviction starts at once and the target ratio is higher, so the clamp is
# active.
FLAGS = (
    f"--seq-length {SEQUENCE} --train-iters {STEPS} --lr 3e-4 --lr-decay-style constant --adam-beta2 0.95 "
    f"--clip-grad 1.0 --weight-decay 0 --eval-iters 0 --log-interval 1 --tensorboard-log-interval 1 "
    "--seed 4321 "
    f"--dms-window {WINDOW} --dms-alpha-scale 2 --dms-alpha-offset 1 --dms-temperature 0.5 "
    "--dms-final-cr 4 --dms-steps-per-cr 1"
).split()


@dataclass
class Workspace:
    """A base checkpoint and data in a temporary folder, and the runs made from them.

    server: forks the ranks of `run`; None means that torchrun starts them.
    """

    folder: Path
    server: ForkServer | None = None
    hf: Path = field(init=False)
    base: Path = field(init=False)
    other_teacher: Path = field(init=False)
    data: Path = field(init=False)

    def __post_init__(self) -> None:
        self.hf, self.base = self.folder / "hf", self.folder / "base"
        self.other_teacher = self.folder / "other_teacher"
        self.data = self.folder / "data"

    def command(self, processes: int, *flags: str) -> list[str]:
        """Return the command line of one run through torchrun."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        return [*launcher, "--master-port", str(free_port()), str(SCRIPT), *self.arguments(*flags)]

    def arguments(self, *flags: str) -> list[str]:
        """Return the arguments of the entry script for one run."""
        return [
            *FLAGS,
            *("--train-data-path", str(self.data)),
            *_defaults("--pretrained-checkpoint", str(self.base), flags),
            *_defaults("--dms-teacher", str(self.base), flags),
            *_defaults("--micro-batch-size", "2", flags),
            *_defaults("--global-batch-size", "4", flags),
            *(flag for flag in flags if not flag.startswith("no--")),
        ]

    def run(self, name: str, processes: int, *flags: str) -> dict[str, list[float]]:
        """Run to the end -> the curve of every logged scalar, by its name.

        Raises RuntimeError with the end of the log when a rank fails.
        """
        log = self.folder / f"{name}.log"
        board = self.folder / "boards" / name
        shutil.rmtree(board, ignore_errors=True)
        flags = (*flags, "--tensorboard-dir", str(board))
        if self.server is None:
            command = self.command(processes, *flags)
            with log.open("w") as out:
                done = subprocess.run(
                    command, stdout=out, stderr=subprocess.STDOUT, env=environment(), timeout=TIMEOUT
                )
        else:
            words = self.arguments(*flags)
            done = self.server.torchrun(SCRIPT, words, processes, log=log, timeout=TIMEOUT)
        if done.returncode:
            command = " ".join(map(str, done.args))
            raise RuntimeError(f"{command}\nexit code {done.returncode}\n{log.read_text()[-6000:]}")
        return read_curves(board)


def _defaults(flag: str, value: str, given: tuple[str, ...]) -> list[str]:
    """Return the flag and its value, or nothing if the flag or `no--flag` is given."""
    return [] if flag in given or f"no{flag}" in given else [flag, value]


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_curves(board: Path) -> dict[str, list[float]]:
    """Return the scalars of a TensorBoard folder, in the order of their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def make_base(workspace: Workspace) -> None:
    """Save a random Qwen3 (GQA 4 / 2, q- and k-norm, tied), its import, and a teacher of another size."""
    from megatron_dms.conversion import import_hf

    save_qwen3(workspace.hf)
    import_hf(workspace.hf, workspace.base)
    save_qwen3(
        workspace.other_teacher,
        **{"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": False},
    )


def save_qwen3(folder: Path, **changes: object) -> None:
    """Save a random Qwen3 with a tokenizer. changes: settings of its config that differ."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # peaked distributions, so that KL and gradients are far from rounding
    }
    model = Qwen3ForCausalLM(Qwen3Config(**settings | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w1"}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    empty = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    tokenizer |= {"added_tokens": [], **dict.fromkeys(empty)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0", "eos_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_data(workspace: Workspace, seed: int = 11) -> None:
    """Write documents of many lengths, so that padding and the loss mask matter."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    tokens = IndexedDatasetBuilder(f"{workspace.data}.bin", dtype=np.uint16)
    masks = IndexedDatasetBuilder(f"{workspace.data}_loss_mask.bin", dtype=np.uint8)
    for _ in range(60):
        length = int(generator.integers(12, SEQUENCE + 2))
        mask = (np.arange(length) >= length // 3).astype(np.uint8)
        for builder, values in ((tokens, generator.integers(0, VOCAB, length)), (masks, mask)):
            builder.add_document(torch.from_numpy(values.astype(np.int64)), [length])
    tokens.finalize(f"{workspace.data}.idx")
    masks.finalize(f"{workspace.data}_loss_mask.idx")
