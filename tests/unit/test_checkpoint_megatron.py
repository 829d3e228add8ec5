"""Imports loaded by Megatron itself, at several layouts, against transformers' own models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from test_checkpoint_models import VOCAB, make_llama, make_qwen3

from megatron_dms.checkpoint import import_hf
from megatron_dms.checkpoint.megatron_folder import open_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"
TOLERANCE = 1e-4
LAYOUTS = ((1, 1), (2, 1), (1, 2))  # TP x PP on two processes
TOKENS = 100  # three times the original context of the tests' llama3 RoPE


def logits_on_two_processes(rank: int, folder: Path, names: list[str]) -> None:
    """Process `rank` of 2 loads every checkpoint at every layout; rank 1, always last stage, saves logits."""
    from megatron_dms.platform import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dms.checkpoint import verify

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    tokens = torch.load(folder / "tokens.pt")
    for tp, pp in LAYOUTS:
        parallel_state.initialize_model_parallel(tp, pp)
        model_parallel_cuda_manual_seed(1)
        for name in names:
            reader, args = open_checkpoint(folder / name)
            model = verify.build_model(args).eval()
            verify.load_weights(model, reader.folder)
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], args.hidden_size)
            with torch.no_grad():
                if not parallel_state.is_pipeline_first_stage():
                    torch.distributed.recv(hidden, 0)
                    model.set_input_tensor(hidden)
                out = verify.megatron_logits(model, tokens)
                if not parallel_state.is_pipeline_last_stage():
                    torch.distributed.send(out.contiguous(), 1)
                    continue
                out = gather_from_tensor_model_parallel_region(out)
            if rank == 1:
                torch.save(out[..., :VOCAB], folder / f"{name}_{tp}_{pp}.pt")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_every_layout_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    """Catches: q|k|v not interleaved, gate and up swapped, a layer axis off by one (PP 2), epsilon, q/k norms
    swapped, RoPE scaling beyond its original context, the tied output layer of the last stage.
    """
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    sources = {
        "qwen3": make_qwen3(tmp_path / "hf_qwen3"),
        # an epsilon that shows, and more scaling than Megatron's flags can express
        "llama": make_llama(tmp_path / "hf_llama", rms_norm_eps=1e-2),
    }
    expected = {}
    for name, source in sources.items():
        import_hf(source, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            expected[name] = model.eval()(tokens, use_cache=False).logits
    torch.multiprocessing.spawn(logits_on_two_processes, (tmp_path, list(sources)), nprocs=2)
    for name, reference in expected.items():
        assert reference.std() > 1  # or the tolerance would mean nothing
        for tp, pp in LAYOUTS:
            found = torch.load(tmp_path / f"{name}_{tp}_{pp}.pt")
            diff = (found - reference).abs().max().item()
            print(f"{name} TP {tp} PP {pp}: largest difference of logits {diff:.1e}")
            assert diff < TOLERANCE, (name, tp, pp)


def test_verify_tells_equal_from_unequal(tmp_path: Path) -> None:
    """Catches: a verify that cannot fail: the second HF checkpoint differs in one value of one tensor."""
    source = make_llama(tmp_path / "hf", torch.bfloat16)
    import_hf(source, tmp_path / "megatron")
    other = make_llama(tmp_path / "other", torch.bfloat16)
    damage = sorted(other.glob("*.safetensors"))[-1]
    content = bytearray(damage.read_bytes())
    content[-1] ^= 0x01  # the exponent of the last value
    damage.write_bytes(content)
    for folder, status in ((source, 0), (other, 1)):
        command = [sys.executable, TOOL, "verify", "--hf", folder, "--megatron", tmp_path / "megatron"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == status, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result.keys() == {"tensors_equal", "tensors", "max_abs_logit_diff", "argmax_agreement"}
        assert result["tensors_equal"] == (status == 0) and result["tensors"] == 21
        assert (result["max_abs_logit_diff"] < TOLERANCE) == (status == 0)
