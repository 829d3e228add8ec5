"""How fast a conversion is, and how much memory it takes, against `cp` of the same bytes on the same disk.

`megatron-dms bench convert` calls it. It runs on Linux only (/proc).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.hf_folder import INDEX
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.safetensors_file import TensorInfo, write_file

HIDDEN = 4096  # as in Llama 3 8B, whose shapes the synthetic model has; all other sizes follow
_FFN, _VOCAB, _HEAD = 3.5, 31.3125, 128
_SHARD_BYTES = 2 * 10**9
_INTERPRETER_BYTES = 500 * 10**6
_COPIES = 3
"""Copies of the checkpoint on the disk at one time: the source, its import, and the export of the import."""
_ROOT = Path(__file__).resolve().parents[2]
"""Where the package lies: a clone, or the folder it is installed in."""
# VmHWM and not ru_maxrss, which starts at the memory of the parent process
_CHILD = """
import atexit, re, sys
peak = lambda: re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
atexit.register(lambda: print(peak()))
sys.path.insert(0, sys.argv[1])
from megatron_dms.cli.convert import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Moved:
    """One way to move the checkpoint. Times are medians in seconds, memory is in bytes.

    start_seconds: time of the process outside the conversion, mostly to import Python's modules and torch.
    """

    seconds: float
    start_seconds: float
    ratio_to_cp: float
    peak_bytes: int
    allowed_bytes: int


def synthetic(folder: Path, gigabytes: float) -> dict[str, TensorInfo]:
    """Write a Llama checkpoint in bfloat16 with as many layers as it takes to reach `gigabytes` (10^9 bytes).

    Values are random and finite; they are in files of 2 GB with an index. Return what was written.
    """
    hidden = HIDDEN
    heads = max(1, hidden // _HEAD)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(_FFN * hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": _HEAD,
        "vocab_size": int(_VOCAB * hidden),
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 1,
    }
    model = read_model(config)
    rows = model.family.rows(model, None)
    once, layer = (
        2 * sum(prod(shape) for row in rows if row.per_layer == per_layer for shape in row.shapes)
        for per_layer in (False, True)
    )
    config["num_hidden_layers"] = layers = max(1, ceil((gigabytes * 1e9 - once) / layer))
    shapes = {
        name: shape
        for row in rows
        for number in row.layers(layers)
        for name, shape in zip(row.hf_names(number), row.shapes, strict=True)
    }
    infos, number, filled = {}, 1, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if filled and filled + size > _SHARD_BYTES:
            number, filled = number + 1, 0
        filled += size
        infos[name] = TensorInfo(f"model-{number:05d}.safetensors", torch.bfloat16, shape)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {name: info.file for name, info in infos.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # positive finite bfloat16 numbers, repeated, because making them takes longer than everything else
    block = torch.randint(0x7F80, (2**23,), dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    for file in dict.fromkeys(weight_map.values()):
        inside = {name: info for name, info in infos.items() if info.file == file}
        stream = (
            (name, _repeat(block.view(torch.bfloat16), prod(info.shape))) for name, info in inside.items()
        )
        write_file(folder / file, inside, stream)
    return infos


def _repeat(block: Tensor, count: int) -> Iterator[Tensor]:
    for done in range(0, count, len(block)):
        yield block[: min(len(block), count - done)]


def _convert(command: str, hf: Path, megatron: Path) -> tuple[float, int]:
    """Return the seconds of the conversion itself, and the peak memory of its process in bytes."""
    arguments: list[str | Path] = [command, "--hf", hf, "--megatron", megatron]
    report, peak = _output(command, sys.executable, "-c", _CHILD, _ROOT, *arguments).splitlines()[-2:]
    return json.loads(report)["seconds"], int(peak) * 1024


def _copy(source: Path, target: Path) -> tuple[float, int]:
    begin = time.monotonic()
    _output("cp", "cp", "-r", source, target)
    return time.monotonic() - begin, 0


def _output(step: str, *command: str | Path) -> str:
    """Return what a command prints; raise CheckpointError with its last line on stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        raise CheckpointError(f"{step} ended with status {done.returncode}: {said}")
    return done.stdout


def run(
    folder: Path, gigabytes: float, repeats: int, say: Callable[[str], None]
) -> tuple[int, dict[str, Moved]]:
    """Measure import and export, each after a cp of its input, in `repeats` rounds after one that warms up.

    Args:
        folder: an existing folder on the disk to measure. Nothing is left there.

    Returns:
        Bytes of the checkpoint, and the figures of each step.

    Raises:
        CheckpointError: a number is out of range, the folder is missing or the disk is too small (before any
            work), the disk is full, or a step fails.
    """
    _check(folder, gigabytes)
    try:
        return _run(folder, gigabytes, repeats, say)
    except OSError as error:
        raise CheckpointError(f"the benchmark in {folder} failed: {error.strerror or error}") from error


def _check(folder: Path, gigabytes: float) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"--folder {folder} is no folder; name one on the disk to measure")
    needed, free = _COPIES * gigabytes, shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise CheckpointError(
            f"disk full: {folder} needs {needed:.3g} GB, {free:.3g} GB are free; make room, choose another "
            "disk or lower --gigabytes"
        )


def _run(
    folder: Path, gigabytes: float, repeats: int, say: Callable[[str], None]
) -> tuple[int, dict[str, Moved]]:
    with TemporaryDirectory(prefix="bench_convert_", dir=folder) as name:
        work = Path(name)
        source, copy, megatron, back = (work / part for part in ("hf", "copy", "megatron", "back"))
        say(f"making a checkpoint of {gigabytes} GB or more in {work} ...")
        infos = synthetic(source, gigabytes)
        size = sum(info.nbytes for info in infos.values())
        # Each conversion runs right after a cp of its input: a virtual machine has to get memory from its
        # host if it has not used it for a while, which slows down the first writing of so many bytes.
        steps: dict[str, Callable[[], tuple[float, int]]] = {
            "cp to import": lambda: _copy(source, copy),
            "import": lambda: _convert("import", source, megatron),
            "cp to export": lambda: _copy(megatron, copy),
            "export": lambda: _convert("export", back, megatron),
        }
        outputs = {"cp to import": copy, "cp to export": copy, "export": back}
        found: dict[str, list[tuple[float, float, int]]] = {step: [] for step in steps}
        for number in range(repeats + 1):
            for step, measure in steps.items():
                os.sync()  # otherwise a step would wait until the output of the step before it is on the disk
                begin = time.monotonic()
                seconds, peak = measure()
                start = time.monotonic() - begin - seconds
                say(f"{'warm-up' if number == 0 else f'{number} of {repeats}'}: {step} {seconds:.2f} s")
                if number > 0:
                    found[step].append((seconds, start, peak))
                if step != "import":
                    shutil.rmtree(outputs[step])
            shutil.rmtree(megatron)
        shards = {
            file: sum(info.nbytes for info in infos.values() if info.file == file)
            for file in {info.file for info in infos.values()}
        }
        largest = max(info.nbytes for info in infos.values())
        allowed = 2 * largest + max(shards.values()) + _INTERPRETER_BYTES
        cp = {
            step: median(seconds for seconds, *_ in found[f"cp to {step}"]) for step in ("import", "export")
        }
        return size, {
            step: Moved(
                median(seconds for seconds, *_ in runs),
                median(start for _, start, _ in runs),
                median(seconds for seconds, *_ in runs) / cp[step] if step in cp else 1.0,
                max(peak for *_, peak in runs),
                allowed,
            )
            for step, runs in found.items()
        }
