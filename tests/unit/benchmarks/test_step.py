"""`bench step` on a tiny model, in processes of its own, because Megatron is made to run on the CPU there."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.benchmark_output import rows_of
from tests.support.tools import run_python, run_tool

pytestmark = pytest.mark.slow

CR, T = 4.0, 160
BAD = {"size": "huge", "cr": 0.5, "backends": ["dense", "fast"], "window": -1, "contexts": [8, 0]}


def test_command_line() -> None:
    """Catches: a step that fails without DMS or with the fused output layer, a ratio to another row, chatter
    on stdout."""
    options = ("--contexts", 32, T, "--repeats", 2, "--cr", CR, "--backends", "dense", "flash")
    done = run_tool("bench", "step", *options, "--fuse-output-layer", process=True)
    assert done.status == 0, done.error[-3000:]
    rows = rows_of(done.out, columns=7)
    assert [row["T"] for row in rows] == [32] * 4 + [T] * 4
    for i, row in enumerate(rows):
        _, _, sdpa, megatron = rows[i // 4 * 4 : i // 4 * 4 + 4]
        assert sdpa["attention"] == "without DMS, SDPA" and megatron["attention"].endswith("Megatron's")
        assert row["note"] is None and row["peak_bytes"] > 0
        assert row["to_sdpa"] == pytest.approx(row["ms"] / sdpa["ms"])
        assert row["to_megatron"] == pytest.approx(row["ms"] / megatron["ms"])


def test_all_candidates_take_one_step(tmp_path: Path) -> None:
    """Compares the gradients of the whole step between candidates. Catches: students or teachers with
    weights of their own, a student that is not trained, a step that changes the weights or adds up
    gradients, decisions of another ratio, SDPA that sees the future, DMS left out of a student."""
    out = tmp_path / "found.json"
    done = run_python(__file__, out)
    assert done.status == 0, done.error[-3000:]
    found = json.loads(out.read_text())
    assert found["same"] == {
        **{"dense/flash": True, "dense/again": True, "SDPA/Megatron": True, "fused/dense": True},
        **{"dense/SDPA": False, "weights before and after": True},
    }
    assert found["sets of parameters"] == 1 and found["largest gradient"] > 1e-4
    assert found["cr"] == pytest.approx(CR, rel=0.15) and found["cr without DMS"] is None
    assert found["refused"].keys() == BAD.keys(), "an error that comes late, or none"


def compare_steps(out: Path) -> None:
    """Compute what the test above asserts."""
    import torch

    from megatron_dms.upstream import cpu

    cpu.install()
    from megatron_dms.benchmarks import step as benchmark
    from megatron_dms.config import DMSConfig

    device = torch.device("cpu")
    tokens = torch.randint(1024, (2, T), generator=torch.Generator().manual_seed(0))
    gradients, weights = {}, []
    with benchmark._one_process(device):
        config = benchmark._transformer_config(benchmark.SIZES["tiny"], torch.float32, device)
        for fuse in (False, True):
            torch.manual_seed(1)
            offset = benchmark.offset_of(CR)
            dms = DMSConfig(window=16, alpha_offset=offset, final_cr=CR, fuse_output_layer=fuse)
            candidates = benchmark.specs(config, dms, ["dense", "flash"])
            steps = benchmark._Steps(config, candidates, 1024, T, dms, device)
            own = list(steps.ddp.parameters())
            weights.append([x.clone() for x in own])
            for name in ["dense", *steps.models]:  # the first one twice
                gradients[name, fuse, "again"] = gradients.get((name, fuse))
                steps.run(name, tokens)
                gradients[name, fuse] = torch.cat([x.main_grad.flatten() for x in own if x.requires_grad])
            weights.append([x.clone() for x in own])

    def same(one: tuple, other: tuple) -> bool:
        return torch.allclose(gradients[one], gradients[other], rtol=1e-3, atol=1e-7)

    dense, sdpa = ("dense", False), (benchmark.SDPA, False)
    found = {
        "same": {
            "dense/flash": same(dense, ("flash", False)),
            "dense/again": same(dense, (*dense, "again")),
            "SDPA/Megatron": same(sdpa, (benchmark.MEGATRON, False)),
            "fused/dense": same(("dense", True), dense),
            "dense/SDPA": same(dense, sdpa),
            "weights before and after": all(map(torch.equal, *weights[:2])),
        },
        "sets of parameters": len({frozenset(map(id, m.parameters())) for m in steps.models.values()}),
        "largest gradient": gradients[dense].abs().max().item(),
        "cr": steps.achieved_cr("dense"),
        "cr without DMS": steps.achieved_cr(benchmark.SDPA),
        "refused": {},
    }
    good = {"size": "tiny", "contexts": [8], "batch": 1, "cr": 2.0, "window": 4, "backends": ["dense"]}
    good |= {"fuse_output_layer": False, "dtype": torch.float32, "repeats": 1, "device": device, "say": print}
    for name, value in BAD.items():
        try:
            benchmark.measure(**good | {name: value})
        except ValueError as error:
            found["refused"][name] = str(error)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    compare_steps(Path(sys.argv[1]))
