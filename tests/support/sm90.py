"""Compile Triton kernels for an H100 without one, and read the properties of the machine code."""

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_for_sm90(function: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> dict:
    """Registers, stack and shared memory of one variant of a kernel, from its compiled machine code.

    Args:
        types: of pointers ("bf16" for "*bf16") and of numbers; pointers that are not named are fp32.
        constants: the compile-time arguments.
        options: num_warps and num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "fp32")
            aligned[(i,)] = [["tt.divisibility", 16]]  # as at a launch with torch's allocations
        else:
            signature[name] = types[name]
            if name.startswith("stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    started = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "ptx_target": re.search(r"\.target (\w+)", ptx).group(1),
        "mma": "mma.sync" in ptx or "wgmma" in ptx,
        "atomics": re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE) is not None,
        "tf32": "tf32" in ptx,
        "shared": compiled.metadata.shared,
        "warps": options["num_warps"],
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK and LOCAL of a compiled kernel, from the cuobjdump of triton's wheel.

    Spilled registers are on the stack.
    """
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")}
