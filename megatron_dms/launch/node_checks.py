"""What one node can check alone (devices, disk, checkpoints, data, layout), and the facts to compare."""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_dms.conversion import CheckpointError
from megatron_dms.data.token_files import check_pair, loss_mask_prefix
from megatron_dms.errors import DataError, StartupError
from megatron_dms.launch.node_report import Finding
from megatron_dms.layout_rules import batch_multiple, data_parallel_size

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9
_PACKAGES = ("torch", "megatron-core", "transformers", "nvidia-modelopt", "transformer-engine")
_DATA_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")


def training_flags(words: Sequence[str]) -> Namespace:
    """Read the flags of pretrain_dms.py that say where files are and how ranks are laid out.

    pretrain_dms.py checks its other flags itself.

    Raises:
        ValueError: a size is no whole number.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for flag in ("--save", "--load", "--load-hf", "--pretrained-checkpoint", "--dms-teacher"):
        parser.add_argument(flag)
    for flag in _DATA_FLAGS:
        parser.add_argument(flag, nargs="*", default=[])
    for kind in ("tensor-model", "pipeline-model", "context"):
        parser.add_argument(f"--{kind}-parallel-size", type=int, default=1)
    for flag in ("--micro-batch-size", "--global-batch-size", "--ckpt-step"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--finetune", action="store_true")
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise ValueError(f"training flags: {error}") from error


def check_gpus(device: str, expected: int) -> Finding:
    """Check that there are as many CUDA devices as processes. On the CPU there is nothing to count."""
    import torch

    if device == "cpu":
        return Finding("gpus", True, "cpu", "cpu")
    found = torch.cuda.device_count()
    fix = f"look at nvidia-smi on this node and exclude it, or set GPUS_PER_NODE={found}"
    return Finding("gpus", found == expected, f"{found} GPUs", f"{expected}", fix)


def check_disk(save: str | None, minimum_gb: float) -> Finding:
    """Check that the folder of --save, or the nearest folder above it, takes a file and has room."""
    if save is None:
        return Finding("disk", False, "no --save", "--save DIR", "add --save DIR to TRAIN_ARGS")
    folder = Path(save).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight_"):
            free = shutil.disk_usage(folder).free / GB
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
        fix = "mount it on this node, or mend its permissions"
        return Finding("disk", False, found, "a folder to write to", fix)
    fix = "delete old checkpoints, choose another --save, or lower MIN_FREE_GB"
    return Finding("disk", free >= minimum_gb, f"{free:.0f} GB free at {folder}", f"{minimum_gb:g} GB", fix)


def check_checkpoints(flags: Namespace) -> tuple[list[Finding], dict[str, str]]:
    """Open the start and the teacher of the run as the run will open them, and read each file at its end.

    Returns:
        The findings, and a digest of names and sizes for each of the two.
    """
    from megatron_dms.training.startup import starting_point
    from megatron_dms.training.weights import open_weights

    sources = {"start": lambda: starting_point(flags)[0]}
    if flags.dms_teacher not in (None, "self"):
        sources["teacher"] = lambda: open_weights(flags.dms_teacher)
    findings, facts = [], {}
    for name, opened in sources.items():
        try:
            weights = opened()
            folder = getattr(weights, "iteration_folder", weights.folder)
            facts[name] = _digest(folder, (path for path in folder.rglob("*") if path.is_file()))
            findings.append(Finding("checkpoint", True, str(folder)))
        except (CheckpointError, StartupError, OSError) as error:
            findings.append(Finding("checkpoint", False, f"{name}: {error}", "a readable checkpoint",
                                    "mount or copy it on this node, or mend the flag"))  # fmt: skip
    return findings, facts


def check_data(flags: Namespace) -> tuple[list[Finding], dict[str, str]]:
    """Check token files and loss masks as the run itself does.

    Returns:
        The findings, and a digest of names and sizes for each prefix.
    """
    findings, facts = [], {}
    prefixes = [prefix for flag in _DATA_FLAGS for prefix in getattr(flags, flag[2:].replace("-", "_"))]
    if not prefixes:
        return [Finding("data", False, "no data", "--train-data-path PREFIX", "add it to TRAIN_ARGS")], {}
    for prefix in dict.fromkeys(prefixes):
        try:
            check_pair(prefix)
            stems = (prefix, loss_mask_prefix(prefix))
            files = [Path(stem + ending) for stem in stems for ending in (".bin", ".idx")]
            facts[prefix] = _digest(Path(prefix).parent, files)
            findings.append(Finding("data", True, prefix))
        except (DataError, OSError) as error:
            findings.append(Finding("data", False, str(error), f"{prefix}.bin and its three companions",
                                    "mount or copy them on this node, or mend the flag"))  # fmt: skip
    return findings, facts


def check_processes(flags: Namespace, world: int) -> list[Finding]:
    """Check the world size against TP x PP x CP, and the global batch against the data-parallel size."""
    tp, pp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size
    cp = flags.context_parallel_size
    one = tp * pp * cp
    text = f"TP {tp} x PP {pp} x CP {cp} = {one}"
    data_parallel = data_parallel_size(world, tp, pp, cp)
    if data_parallel is None:
        fix = f"make NODES x GPUS_PER_NODE a multiple of {one}, or choose sizes whose product divides {world}"
        return [Finding("layout", False, f"{world} processes", f"a multiple of {text}", fix)]
    findings = [Finding("layout", True, f"{world} processes, {text}")]
    micro, batch = flags.micro_batch_size, flags.global_batch_size
    step = batch_multiple(micro, data_parallel) if micro else 0
    if step and batch and batch % step:
        nearest = max(step, round(batch / step) * step)
        expected = f"a multiple of micro batch {micro} x data parallel {data_parallel} = {step}"
        findings.append(Finding("layout", False, f"--global-batch-size {batch}", expected,
                                f"use --global-batch-size {nearest}"))  # fmt: skip
    return findings


def versions(device: str) -> dict[str, str]:
    """The versions that must be the same on all nodes, and which source runs."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    if device == "cuda":
        import torch

        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    # a wheel has no script at its root
    source = [path for path in (ROOT / "pretrain_dms.py",) if path.exists()]
    source += (ROOT / "megatron_dms").rglob("*.py")
    content = hashlib.sha256()
    for path in sorted(source):
        content.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    found["megatron_dms"] = f"commit {_commit()}, source {content.hexdigest()[:12]}"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The clone's commit; "unknown" if there is no git or no clone, as in some containers."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _digest(folder: Path, files: Iterable[Path]) -> str:
    """Digest the names and sizes of files, and read each file at its end.

    Raises:
        OSError: a file cannot be read; the error names it.
    """
    content = hashlib.sha256()
    total = 0
    for path in sorted(files):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            file.read(1)
        total += size
        content.update(f"{path.relative_to(folder)} {size}\n".encode())
    return f"{total} bytes, names and sizes {content.hexdigest()[:12]}"
