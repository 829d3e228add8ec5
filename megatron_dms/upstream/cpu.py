"""Megatron-LM on CPU: answers for torch.cuda where there is no CUDA device.

Megatron names the CUDA device throughout: it allocates on it, asks for streams, events, memory and random
state. Where no such device exists, `install()` maps all that to the CPU, so that the very same `pretrain()`
runs with gloo. On a machine with a CUDA device it refuses to do anything.

Checked with megatron-core 0.19.2 and torch 2.13. Call before the first import of `megatron`:

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
_PRETENDED_MEMORY = 1 << 34  # bytes; Megatron only prints it and divides by it

# What Megatron's flags must say on CPU: gloo, no fused CUDA kernels.
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
    return getattr(torch.cuda, "_answered_by_megatron_dms", False)


def install() -> None:
    """Answer for torch.cuda on a machine that has no CUDA device; a second call does nothing.

    Raises:
        RuntimeError: there is a CUDA device, or megatron was imported already (it binds torch.cuda's
            functions on import).
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a CUDA device: the CPU platform must not be installed on it")
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU platform must be installed before megatron is imported")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's fusions are torch.compile'd for CUDA
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the arguments' validator wants it
    _replace_cuda_functions()
    _CudaMeansCpu().__enter__()  # stays on for the life of the process
    _replace_megatron_rng_access()
    torch.cuda._answered_by_megatron_dms = True


class _CudaMeansCpu(TorchFunctionMode):
    """Turns every request for the CUDA device into one for the CPU."""

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
    cuda = torch.cuda
    cuda.is_available = _returns(True)
    torch.accelerator.is_available = _returns(False)  # the data loader asks before it pins memory
    torch.accelerator.current_accelerator = _returns(None)
    cuda.device_count = _returns(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # one "device" per process
    cuda.current_device = _returns(_CPU)
    for name in ("set_device", "synchronize", "set_stream", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _returns(None))
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _returns(_InstantStream()))
    cuda.Stream = cuda.Event = _InstantStream
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _returns(0))
    cuda.memory_stats = _returns({})
    cuda.mem_get_info = _returns((_PRETENDED_MEMORY, _PRETENDED_MEMORY))
    properties = SimpleNamespace(major=9, minor=0, name="cpu", total_memory=_PRETENDED_MEMORY)
    cuda.get_device_properties = _returns(properties)
    cuda.get_device_capability = _returns((properties.major, properties.minor))
    cuda.get_device_name = _returns(properties.name)

    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    for name in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _replace_megatron_rng_access() -> None:
    """Megatron's own two accessors of the CUDA generator (private names, megatron-core 0.19.2)."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
