"""Measurements that predictions are held against: the authors', NVIDIA's, and those in this repository.

tests/unit/planning/test_check.py compares the repository's with docs/first_run.md and docs/performance.md.
"""

from typing import NamedTuple

from megatron_dms.planning.models import ModelSize


class Training(NamedTuple):
    """A retrofit whose device-hours are known. `ranks`: of which the best layout is predicted; only the total
    of the paper's runs is known, so there it is assumed."""

    name: str
    model: str
    recipe: str
    context: int
    batch: int
    steps: int
    ranks: int
    device_hours: float
    source: str


TRAININGS = (
    Training(
        "Llama 3.2 1B, per unit of CR",
        "llama-3.2-1b",
        "paper",
        4096,
        1024,
        100,
        64,
        10.0,
        "paper; 64 assumed",
    ),
    Training(
        "Qwen-R1 32B, per unit of CR", "qwen-r1-32b", "paper", 8192, 1024, 100, 64, 345.0, "paper; 64 assumed"
    ),
    Training(
        "Qwen3-8B adapter, CR 16", "qwen3-8b", "adapter", 32768, 8, 544, 8, 32.0, "NVIDIA: about 4 h on 8"
    ),
)
"""All on H100. 100 steps per unit of CR: the paper's schedule."""


class Decode(NamedTuple):
    """docs/performance.md, "Decoding": fp32, on two CPU cores, pairs forced to 1 / CR. ms of a step; cache:
    allocated bytes over those of the dense cache."""

    shape: str
    batch: int
    cr: float
    context: int
    dense_ms: float
    dms_ms: float
    cache: float


DECODES = tuple(
    Decode(*row)
    for row in (
        ("Llama 3.2 1B", 1, 8, 4096, 251, 224, 0.131),
        ("Llama 3.2 1B", 1, 8, 16384, 483, 241, 0.127),
        ("Llama 3.2 1B", 1, 8, 32768, 810, 250, 0.126),
        ("Llama 3.2 1B", 1, 8, 65536, 2224, 593, 0.126),
        ("Llama 3.2 1B", 4, 8, 4096, 671, 476, 0.133),
        ("Llama 3.2 1B", 4, 8, 8192, 936, 498, 0.129),
        ("Llama 3.2 1B", 1, 1, 4096, 238, 227, 1.000),
        ("Llama 3.2 1B", 1, 1, 16384, 421, 250, 1.000),
        ("Llama 3.2 1B", 4, 1, 4096, 713, 531, 1.000),
        ("Qwen3 0.6B", 1, 8, 4096, 193, 104, 0.133),
        ("Qwen3 0.6B", 1, 8, 16384, 898, 136, 0.127),
        ("Qwen3 0.6B", 1, 8, 32768, 1607, 140, 0.126),
        ("Qwen3 0.6B", 4, 8, 4096, 901, 255, 0.133),
        ("Qwen3 0.6B", 1, 1, 4096, 200, 153, 1.000),
        ("Qwen3 0.6B", 1, 1, 16384, 968, 314, 1.000),
    )
)
DECODE_WINDOW = 256

SERVED = {1024: (1519, 5069, 5069), 2048: (761, 2915, 5069), 4096: (381, 1515, 3075), 8192: (190, 799, 1554)}
"""docs/performance.md, "Serving": context -> largest batch with a dense cache, CR 4, CR 8; the toy, fp32."""
SERVED_MEMORY = 1e9
SERVED_CRS = (1.0, 4.0, 8.0)


class Demo(NamedTuple):
    """docs/first_run.md, the demo's table; pairs, means over layers and KV heads."""

    name: str
    achieved_cr: float
    kv_reads: float
    peak_tokens: float


DEMO = (Demo("teacher", 1.0, 26727, 250.8), Demo("cr4", 4.10, 9077, 74.4), Demo("cr8", 7.18, 6183, 49.7))
DEMO_WINDOW = 16

QWEN3_SMALL = ModelSize("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, 131072, tied=True, qk_norm=True)
TOY = ModelSize("tiny", 2, 64, 96, 4, 2, 16, 131, 131072, tied=True)
"""Shapes of megatron_dms/benchmarks/synthetic_models.py that are no presets."""

NOT_COMPARED = {
    "training steps of docs/performance.md": "toys on two CPU cores: calls, not arithmetic, take the time",
    "attention, distillation losses, conversion": "parts, on CPU cores, of which there is no model here",
    "up to 5 x throughput of Qwen3-8B (paper)": "its batches, lengths and device memory are not known here",
    "serve: steps and tokens/s of docs/performance.md": "the toy's step is calls: 0.6 to 1.9 ms",
}
