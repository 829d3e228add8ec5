"""Read what `torch.save` wrote without importing or running anything that the file names.

A checkpoint's arguments hold objects of Megatron's (enums, optimizer configs). Reading plain numbers needs
neither the seconds of importing Megatron nor trust in the file: tensors and plain types are built, and any
other class becomes an `Opaque`. Use as `torch.load(..., pickle_module=plain_pickle,
weights_only=False)`.
"""

import pickle
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch

from megatron_dms.upstream.torch_checkpoint import is_tensor_builder

_CLASSES = {
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("pathlib", "PosixPath"): PurePath,
    ("pathlib._local", "PosixPath"): PurePath,  # Python 3.13
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, list, dict, tuple, complex, bytearray)},
}


class Opaque:
    """Stands for an object of a class that was not imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}"


class Unpickler(pickle.Unpickler):
    """Builds tensors and plain types; every other object becomes Opaque."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if is_tensor_builder(module, name):
            return super().find_class(module, name)
        if module in ("torch", "torch.storage"):
            found = getattr(torch, name, None) if module == "torch" else getattr(torch.storage, name, None)
            storage = isinstance(found, type) and (name.endswith("Storage") or found is torch.Size)
            if storage or isinstance(found, torch.dtype):
                return found
        return type(f"{module}.{name}", (Opaque,), {})
