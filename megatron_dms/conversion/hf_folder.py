"""An HF checkpoint folder: config.json, safetensors and side files. Every tensor name is accounted for."""

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dms.conversion import dms_formats
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.safetensors_file import TensorInfo, read_header
from megatron_dms.formats.tensor_rows import FileRows, read_all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TENSOR_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".npy",
    ".distcp",
    ".pkl",
)
_OF_A_RUN = ("trainer_state.json", "*tfevents*", "optimizer*", "scheduler.*", "rng_state*", "zero_to_fp32.py")
_RUN_FOLDERS = ("wandb", "runs", "mlruns")
_FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"
_TENSOR_INDEX = ".bin.index.json"


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file. Raises CheckpointError, naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def is_plain_name(name: object) -> bool:
    """Whether a name is that of a file in the same folder: not a path, and possible as a file name."""
    if not isinstance(name, str) or name in ("", ".", "..") or len(name.encode()) > 255:
        return False
    return name.isprintable() and "/" not in name


def accepted_config_keys(source: Path) -> list[str]:
    """Return the unknown keys of config.json that the user let through on import, from the file `SOURCE`."""
    found = read_json(source).get("accepted_config_keys", [])
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{source} is damaged; import the checkpoint again")
    return found


def read_dms_metadata(folder: Path) -> dict[str, object] | None:
    """Read dms_metadata.json of a folder if there is one."""
    path = folder / dms_formats.METADATA
    return read_json(path) if path.is_file() else None


class HFFolder:
    """The tensors of a folder by name, read one at a time.

    config, dms_metadata: config.json and FastDMS's dms_metadata.json (None if it is not there), parsed.
    infos: name -> file, dtype, shape, in the order of the files.
    Raises CheckpointError for a missing shard, a truncated file, or an index that disagrees with the files.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder; expected a local HF checkpoint with config.json")
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds an adapter (adapter_config.json); merge it into the weights first"
            )
        self.path = path
        self.config = read_json(path / "config.json")
        self.dms_metadata = read_dms_metadata(path)
        index, single = path / INDEX, path / SINGLE
        if index.exists() and single.exists():
            raise CheckpointError(f"{path} has both {INDEX} and {SINGLE}; remove the one that is stale")
        if not index.exists() and not single.exists():
            others = sorted(file.name for file in path.iterdir() if file.name.endswith(_TENSOR_SUFFIXES))
            raise CheckpointError(
                f"{path} has neither {SINGLE} nor {INDEX} (found {', '.join(others) or 'none'}); "
                "save the model in safetensors format first"
            )
        self.infos = read_header(single) if single.exists() else self._read_shards(read_json(index))

    def _read_shards(self, index: dict[str, object]) -> dict[str, TensorInfo]:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not is_plain_name(file):
                raise CheckpointError(
                    f"{self.path / INDEX} puts {name} into {file!r}, expected a file of this folder"
                )
        infos: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            path = self.path / file
            if not path.exists():
                raise CheckpointError(f"{path} is missing, though {INDEX} names it; fetch it again")
            for name, info in read_header(path).items():
                if weight_map.get(name) != file:
                    raise CheckpointError(
                        f"{path} holds {name}, which {INDEX} puts elsewhere: {weight_map.get(name)}"
                    )
                infos[name] = info
        absent = sorted(set(weight_map) - set(infos))
        if absent:
            raise CheckpointError(
                f"{self.path}: {INDEX} names {absent[0]}, but {weight_map[absent[0]]} lacks it"
            )
        return infos

    def head_size(self) -> int | None:
        """Return the head size that the tensors tell (rows of q_proj for each head); None if they do not."""
        info, heads = self.infos.get(_FIRST_QUERY), self.config.get("num_attention_heads")
        if info is None or type(heads) is not int or heads < 1 or not info.shape or info.shape[0] % heads:
            return None
        return info.shape[0] // heads or None

    def read(self, name: str) -> Tensor:
        """Read one tensor, and no bytes of other tensors."""
        return read_all(self.rows(name))

    def rows(self, name: str) -> FileRows:
        """Return one tensor, to be read row by row."""
        info = self.infos[name]
        return FileRows(self.path / info.file, info.offset, info.dtype, info.shape)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Read a part of one tensor, and no other bytes."""
        path = self.path / self.infos[name].file
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot read {name}: {error}") from error


def side_files(folder: Path) -> Iterator[Path]:
    """Yield the files that belong to the model and hold no tensors, relative to the folder.

    Left out are files with tensors, what a training run wrote (`_OF_A_RUN`), hidden folders (.git), folders
    of a run (`_RUN_FOLDERS`), and whole folders that hold tensors or a run's files.
    """
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    tops = {path.parts[0] for path in paths if len(path.parts) > 1 and _left_out(path.name)}
    for path in paths:
        inner = path.parts[:-1]
        hidden = any(part.startswith(".") or part in _RUN_FOLDERS for part in inner)
        if not hidden and not _left_out(path.name) and not (inner and inner[0] in tops):
            yield path


def _left_out(name: str) -> bool:
    """Whether a file holds tensors or was written by a training run."""
    return name.endswith((*_TENSOR_SUFFIXES, _TENSOR_INDEX)) or any(fnmatch(name, kind) for kind in _OF_A_RUN)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes (through links, as a hub cache has them), making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
