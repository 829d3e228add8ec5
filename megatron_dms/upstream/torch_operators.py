"""A look at every operator that torch runs, and at the storages that its tensors live in."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OperatorMode = TorchDispatchMode
"""A context manager whose `__torch_dispatch__(func, types, args, kwargs)` runs in place of each operator."""


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all strided tensors in nested tuples, lists and dicts, by their address.

    The address tells storages apart for as long as they are alive.
    """
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.layout == torch.strided)
    found = (x.untyped_storage() for x in tensors)
    return {storage._cdata: storage for storage in found}
