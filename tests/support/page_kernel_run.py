"""What test_page_kernel.py runs in processes of its own, where triton is imported under other settings.

TRITON_INTERPRET=1 python page_kernel_run.py interpret OUT.pt     every case, in the interpreter
python page_kernel_run.py compile OUT.json                        both kernels for sm_90, no GPU needed
"""

import json
import sys
from pathlib import Path

import torch

from megatron_dms.hf import page_kernel_dms as kernel
from tests.support.page_cases import CASES, FULL, GROWN_CASES, grown, make_inputs
from tests.support.sm90 import NAMES, compile_for_sm90
from tests.support.triton_process import hide_nothing

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
    """Save the outputs of all cases, and those for a NaN in a valid pair and for a fill that is too large."""
    hide_nothing()
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


def compile_all(out: Path) -> None:
    """Compile both kernels in every variant."""
    kernels = kernel._kernels()
    report = {}
    for R, S, D, dtype in COMPILED:
        types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), NAMES[dtype])
        types |= {"owner_ptr": "i64", "fill_ptr": "i32", "order_ptr": "i64", "first_ptr": "i32"}
        types |= {"scale": "fp32", "heads": "i32"}
        for function, constants in (
            (
                kernels.attend_page,
                kernel.page_constants(R, S, D, dtype.itemsize) | {"INTERPRETED": False},
            ),
            (kernels.combine_pages, kernel.combine_constants(R, D)),
        ):
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            variant = f"{function.__name__} R={R} S={S} D={D} {NAMES[dtype]}"
            report[variant] = compile_for_sm90(function, types, constants, **options)
    out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](Path(sys.argv[2]))
