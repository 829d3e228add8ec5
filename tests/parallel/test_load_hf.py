"""From an HF folder straight into a Megatron model, at every layout, against the import of the folder."""

import json
from pathlib import Path

import pytest
import torch
from comparison import TOLERANCE, assert_same_curves
from retrofit import STEPS, Workspace, save_qwen3
from torch import Tensor

from megatron_dms.checkpoint import export_hf, import_hf

TP, PP = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
ADAPTER = (
    *("--dms-predictor", "linear", "--dms-train", "predictor", "--dms-teacher", "self"),
    *("--lr", "3e-2"),
)
LAYOUTS = ((1, 1, None), (2, 1, None), (1, 2, None), (1, 2, 2))  # TP, PP, virtual stages on a rank
SOURCES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
}


def load_both_ways(rank: int, folder: Path, processes: int) -> None:
    """Process `rank`: at every layout, load each model from HF and from the import, and compare the bits."""
    from megatron_dms.platform import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dms.checkpoint.hf_folder import HFFolder
    from megatron_dms.training.weights import HFWeights

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    counted = 0
    read_slice = HFFolder.read_slice

    def count(source: HFFolder, name: str, index: tuple[slice, ...]) -> Tensor:
        nonlocal counted
        piece = read_slice(source, name, index)
        counted += piece.nbytes
        return piece

    HFFolder.read_slice = count
    for tp, pp, virtual in LAYOUTS:
        parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=virtual)
        model_parallel_cuda_manual_seed(1)
        for name in SOURCES:
            weights = HFWeights(folder / name)
            stages = [None] if virtual is None else list(range(virtual))
            # all chunks first: those that share an embedding meet while they are built
            pairs = [[build(weights.args, stage) for _ in range(2)] for stage in stages]
            load_as_megatron_does([slow for _, slow in pairs], folder / f"{name}_megatron/release")
            for models in pairs:
                counted = 0
                weights.load(models[0])
                wanted = own_bytes(models[0], weights.args.vocab_size)
                assert counted == wanted, f"rank {rank}: {counted} bytes read, {wanted} are its own"
                compare(models, weights.args.vocab_size, f"{name} TP {tp} PP {pp} VPP {virtual} rank {rank}")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def load_as_megatron_does(chunks: list, folder: Path) -> None:
    """All virtual stages of this rank from a torch_dist checkpoint."""
    from megatron.core import dist_checkpointing

    wanted = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def build(args, virtual_stage: int | None):
    """This rank's chunk of a GPTModel whose weights are not yet anything."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    tp, pp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization="RMSNorm",
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
    )
    place = {"ignore_virtual": False, "vp_stage": virtual_stage}
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm"),
        vocab_size=-(-args.vocab_size // 4) * 4,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        vp_stage=virtual_stage,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def real_rows(parameter: Tensor, vocab: int) -> int:
    """Rows of this rank's part of a vocabulary that are not padding."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    return min(max(vocab - rank * len(parameter), 0), len(parameter))


def own_bytes(model, vocab: int) -> int:
    """What a rank holds of the file, padding left out."""
    total = 0
    for name, parameter in model.named_parameters():
        rows = real_rows(parameter, vocab) if is_vocabulary(name) else len(parameter)
        total += parameter[:rows].nbytes
    return total


def compare(models: list, vocab: int, where: str) -> None:
    fast, slow = (dict(model.named_parameters()) for model in models)
    assert fast.keys() == slow.keys() and fast
    for name, parameter in fast.items():
        rows = real_rows(parameter, vocab) if is_vocabulary(name) else len(parameter)
        assert not parameter.isnan().any(), f"{where}: {name} was not filled"
        assert torch.equal(parameter[:rows], slow[name][:rows]), f"{where}: {name}"
        assert not parameter[rows:].any(), f"{where}: padding of {name}"


def test_every_rank_reads_its_own_slices_and_no_others(tmp_path: Path) -> None:
    """Two processes; odd vocabulary of 131 rows, padded to 132. Catches: heads of another rank, gate for up,
    a layer of another (virtual) stage, padding left as it was, the tied output layer of the last stage, whole
    tensors read for a slice."""
    for name, changes in SOURCES.items():
        save_qwen3(tmp_path / name, **changes)
        import_hf(tmp_path / name, tmp_path / f"{name}_megatron")
    torch.multiprocessing.spawn(load_both_ways, (tmp_path, 2), nprocs=2)


@pytest.mark.parametrize(
    ("name", "processes", "layout"), [("hf_alone", 1, ()), ("hf_tp2_pp2", 4, (*TP, *PP))]
)
def test_a_run_from_an_hf_folder_is_the_run_from_its_import(
    name: str, processes: int, layout: tuple[str, ...], workspace: Workspace, reference: dict
) -> None:
    """Student and teacher from the HF folder: one process bit for bit, four to 1e-5. Catches: an architecture
    that is not the folder's, a teacher or student left as it was initialised."""
    hf = ("--load-hf", str(workspace.hf), "--dms-teacher", str(workspace.hf))
    curves = workspace.run(name, processes, "no--pretrained-checkpoint", *hf, *layout)
    assert_same_curves(curves, reference, range(STEPS), TOLERANCE if layout else 0.0)


def test_what_was_loaded_from_hf_is_resumed_and_comes_back(workspace: Workspace, tmp_path: Path) -> None:
    """An adapter run at TP 2 x PP 2 from an HF folder, with the same command line again for more steps; all
    tensors of the base model come back bit for bit. Catches: side files missing in --save, --load-hf taken
    for a new start when there is something to resume, padding exported, a layer or head out of place."""
    save = tmp_path / "run"
    flags = (
        *("no--pretrained-checkpoint", "--load-hf", str(workspace.hf), *ADAPTER, *TP, *PP),
        *("--load", str(save), "--save", str(save), "--save-interval", "3"),
    )
    workspace.run("adapter_first", 4, *flags, "--exit-interval", "3")
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    workspace.run("adapter_again", 4, *flags)
    export_hf(save, tmp_path / "out")
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (workspace.hf, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = {name.split("self_attn.")[1] for name in set(after) - set(before)}
    assert added == {"dms_proj_alpha.weight", "dms_proj_alpha_norm.weight"}
    assert after["model.layers.3.self_attn.dms_proj_alpha.weight"].any()
    keys = json.loads((tmp_path / "out/config.json").read_text())
    assert keys["dms_predictor"] == "linear" and (tmp_path / "out/tokenizer.json").is_file()
