"""What test_attention_backends.py runs in processes of its own, where triton is imported under other
settings.

TRITON_INTERPRET=1 python attention_run.py interpret OUT.pt     every case, in the interpreter
python attention_run.py compile OUT.json                        all kernels for sm_90, no GPU needed
"""

import json
import math
import sys
from pathlib import Path

import torch

from megatron_dms.kernels import kl_rows
from megatron_dms.kernels import triton_attention as attention
from megatron_dms.kernels import triton_backward as backward
from megatron_dms.kernels import triton_forward as forward
from tests.support.attention_cases import BF16, CASES, FP16, FP32, make_inputs, results
from tests.support.sm90 import NAMES, compile_for_sm90
from tests.support.triton_process import hide_nothing

COMPILED = [(64, BF16), (80, FP16), (128, BF16), (256, BF16), (128, FP32)]  # head size, type
TWICE = "plain"


def interpret(out: Path) -> None:
    """Save the output and the gradients of each case."""
    hide_nothing()
    found = {case.name: results(attention.triton_attention, case, *make_inputs(case)) for case in CASES}
    case = next(case for case in CASES if case.name == TWICE)
    inputs = make_inputs(case)
    found["again"] = results(attention.triton_attention, case, *inputs)
    found["nothing is negligible"] = results(attention.triton_attention, case, *inputs, threshold=-math.inf)
    found["all is negligible"] = results(attention.triton_attention, case, *inputs, threshold=math.inf)
    torch.save(found, out)


def compile_all(out: Path) -> None:
    """Compile all kernels, the three large ones in every variant."""
    integers = ("order_ptr", "position_ptr", "before_ptr", "T", "window", "rows", "columns", "width")
    integers = dict.fromkeys(integers, "i32")
    numbers = dict.fromkeys(("scale", "natural_scale", "log2_e", "factor"), "fp32")
    own_type = ("q_ptr", "k_ptr", "v_ptr", "kept_k_ptr", "kept_v_ptr", "out_ptr", "grad_ptr")
    own_type += ("dq_ptr", "dk_ptr", "dv_ptr", "student_ptr", "teacher_ptr")
    report = {}
    for D, dtype in COMPILED:
        constants = {"H": 32, "G": 8, "D": D, "DP": attention.padded(D), "DOT": attention.DTYPES[dtype]}
        constants |= {"TEACHER_FIRST": True, "BLOCK": kl_rows.BLOCK}
        small = attention.Blocks(M=64, N=64, num_warps=4, num_stages=3)
        for function, blocks in (
            (forward.attend_queries, attention.forward_blocks(D, dtype)),
            (backward.query_gradients, attention.query_blocks(D, dtype)),
            (backward.key_gradients, attention.key_blocks(D, dtype)),
            *((function, small) for function in (forward.pack_survivors, backward.query_sums)),
            *((function, small._replace(num_warps=8)) for function in (kl_rows.row_sums, kl_rows.row_slopes)),
        ):
            types = integers | numbers | dict.fromkeys(own_type, NAMES[dtype])
            types |= {name: "i32" for name in function.arg_names if name.startswith("stride")}
            options = blocks._asdict()
            sizes = {name: options.pop(name) for name in ("M", "N")}
            variant = f"{function.__name__} D={D} {NAMES[dtype]}"
            own = {name: value for name, value in (constants | sizes).items() if name in function.arg_names}
            report[variant] = compile_for_sm90(function, types, own, **options)
    out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](Path(sys.argv[2]))
