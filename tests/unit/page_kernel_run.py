"""What test_page_kernel.py runs in processes of its own, where triton is imported under other settings.

TRITON_INTERPRET=1 python page_kernel_run.py interpret OUT.pt     every case, in the interpreter
python page_kernel_run.py compile OUT.json                        both kernels for sm_90, no GPU needed
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from page_cases import CASES, FULL, GROWN_CASES, grown, make_inputs

from megatron_dms.hf import page_kernel_dms as kernel

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COMPILED = [  # R, S, D, type; small, usual and largest tiles
    (1, 16, 8, torch.bfloat16),
    (4, 16, 128, torch.bfloat16),
    (8, 64, 128, torch.bfloat16),
    (4, 16, 80, torch.float16),
    (8, 256, 256, torch.bfloat16),
    (32, 256, 256, torch.bfloat16),
    (4, 16, 128, torch.float32),
    (8, 256, 256, torch.float32),
]


def interpret(out: Path) -> None:
    """Outputs per case, and what a NaN in a valid pair and too large a fill give.

    torch.empty gives NaN here, so that what no program has written cannot be read unnoticed.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = {}
    for case in CASES:
        inputs = make_inputs(case)
        results[case.name] = kernel.attend_pages_triton(*inputs)
        if case.name in GROWN_CASES:
            results[f"{case.name}, grown"] = kernel.attend_pages_triton(*grown(inputs))
    inputs = make_inputs(CASES[0])
    inputs.keys_PSD[(inputs.owner_P == 2).nonzero()[0, 0], 0] = torch.nan
    results["NaN in head 2"] = kernel.attend_pages_triton(*inputs)
    inputs = make_inputs(FULL)
    results["fill over S"] = kernel.attend_pages_triton(*inputs._replace(fill_P=inputs.fill_P * 0 + 999))
    torch.save(results, out)


def compile_for_sm90(out: Path) -> None:
    """Registers, stack and shared memory of each variant, from the compiled machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = kernel._kernels()
    target = GPUTarget("cuda", 90, 32)
    report = {}
    for R, S, D, dtype in COMPILED:
        element = {"q_ptr": NAMES[dtype], "keys_ptr": NAMES[dtype], "values_ptr": NAMES[dtype]}
        types = element | {"out_ptr": NAMES[dtype], "owner_ptr": "i64", "fill_ptr": "i32"}
        types |= {"order_ptr": "i64", "first_ptr": "i32", "scale": "fp32", "heads": "i32"}
        for function, constants in (
            (
                kernels.attend_page,
                kernel.page_constants(R, S, D, dtype.itemsize) | {"INTERPRETED": False},
            ),
            (kernels.combine_pages, kernel.combine_constants(R, D)),
        ):
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            signature, aligned = {}, {}
            for i, name in enumerate(function.arg_names):
                if name in constants:
                    signature[name] = "constexpr"
                elif name.endswith("_ptr"):
                    signature[name] = "*" + types.get(name, "fp32")
                    aligned[(i,)] = [["tt.divisibility", 16]]  # as at a launch with torch's allocations
                else:
                    signature[name] = types[name]
            source = ASTSource(function, signature, constants, aligned)
            started = time.perf_counter()
            compiled = triton.compile(source, target=target, options=options)
            ptx = compiled.asm["ptx"]
            variant = f"{function.__name__} R={R} S={S} D={D} {NAMES[dtype]}"
            report[variant] = {
                "seconds": round(time.perf_counter() - started, 2),
                "ptx_target": re.search(r"\.target (\w+)", ptx).group(1),
                "mma": "mma.sync" in ptx or "wgmma" in ptx,
                "atomics": re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE) is not None,
                "tf32": "tf32" in ptx,
                "shared": compiled.metadata.shared,
                "warps": options["num_warps"],
                **resources(compiled.asm["cubin"]),
            }
    out.write_text(json.dumps(report, indent=1))


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a compiled kernel, from the cuobjdump that triton's wheel holds.

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


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_sm90}[sys.argv[1]](Path(sys.argv[2]))
