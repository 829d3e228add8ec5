"""Megatron-LM on CPU: answers for torch.cuda on a machine without a CUDA device.

Megatron names the CUDA device throughout: it allocates there, and asks for streams, events, memory and random
state. On a machine without such a device, `install()` maps all of this to the CPU, so that the very same
`pretrain()` runs with gloo. On a machine with a CUDA device `install()` refuses to do anything.

Call it before the first import of `megatron`:

    if not torch.cuda.is_available():
        cpu.install()
"""

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_PRETENDED_MEMORY = 1 << 34  # bytes; Megatron only prints this number and divides by it
_PROPERTIES = SimpleNamespace(major=9, minor=0, name="cpu", total_memory=_PRETENDED_MEMORY)

# The values that Megatron's flags must have on CPU: gloo, and no fused CUDA kernels.
ARGUMENT_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "bias_dropout_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "cross_entropy_loss_fusion": False,
    "pin_cpu_grads": False,
    "pin_cpu_params": False,
}


def installed() -> bool:
    """Whether this process runs Megatron on the CPU."""
    return torch.cuda.Stream is _InstantStream


def install() -> None:
    """Answer for torch.cuda on a machine that has no CUDA device; a second call does nothing.

    Raises:
        RuntimeError: there is a CUDA device, or megatron was imported already (on import it binds functions
            of torch.cuda).
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a CUDA device: the CPU platform must not be installed on it")
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU platform must be installed before megatron is imported")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron compiles its fusions for CUDA
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's checks of its arguments ask for it
    _replace_cuda_functions()
    _CudaMeansCpu().__enter__()  # stays on for the life of the process
    _replace_megatron_rng_access()


class _CudaMeansCpu(TorchFunctionMode):
    """Turn every request for the CUDA device into one for the CPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        out = func(*args, **kwargs)
        # The distributed optimizer compares type names such as 'torch.cuda.FloatTensor'.
        if func is torch.Tensor.type and isinstance(out, str):
            return out.replace("torch.", "torch.cuda.")
        return out


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _InstantStream:
    """A stream and an event on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> "_InstantStream":
        return self

    def __exit__(self, *error: Any) -> None:
        return None


def _returns(value: Any) -> Callable:
    return lambda *args, **kwargs: value


def _replace_cuda_functions() -> None:
    for name, answer in cuda_answers().items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    # The data loader asks for an accelerator before it pins memory.
    for name, value in {"is_available": False, "current_accelerator": None}.items():
        setattr(torch.accelerator, name, _returns(value))


def cuda_answers() -> dict[str, Any]:
    """What takes the place of each name of torch.cuda that Megatron uses."""
    answers: dict[str, Any] = {
        "is_available": _returns(True),
        # One "device" per process; read at each call, as a forked process may get the variable later.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": _returns(_CPU),
        "Stream": _InstantStream,
        "Event": _InstantStream,
        "memory_stats": _returns({}),
        "mem_get_info": _returns((_PRETENDED_MEMORY, _PRETENDED_MEMORY)),
        "get_device_properties": _returns(_PROPERTIES),
        "get_device_capability": _returns((_PROPERTIES.major, _PROPERTIES.minor)),
        "get_device_name": _returns(_PROPERTIES.name),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
    }
    for name in ("set_device", "synchronize", "set_stream", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = _returns(None)
    for name in ("current_stream", "default_stream", "stream"):
        answers[name] = _returns(_InstantStream())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = _returns(0)
    for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"):
        answers[f"{kind}Tensor"] = getattr(torch, f"{kind}Tensor")
    return answers


def _replace_megatron_rng_access() -> None:
    """Replace Megatron's own two accessors of the CUDA generator."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
