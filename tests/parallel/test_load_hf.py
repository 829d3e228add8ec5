"""Loading an HF folder straight into a Megatron model equals loading its import, at every layout."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dms.conversion import export_hf, import_hf
from megatron_dms.errors import StartupError
from tests.support.comparison import TOLERANCE, assert_same_curves, cross_entropy
from tests.support.forking import ForkServer
from tests.support.retrofit import STEPS, VOCAB, WINDOW, Workspace, save_qwen3

TP, PP = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
ADAPTER = (
    *("--dms-predictor", "linear", "--dms-train", "predictor", "--dms-teacher", "self"),
    *("--lr", "3e-2"),
)
LAYOUTS = ((1, 1, None), (2, 1, None), (1, 2, None), (1, 2, 2))  # TP, PP, virtual stages on a rank
SOURCES = {
    "tied": lambda folder: save_qwen3(folder),
    "untied": lambda folder: save_qwen3(folder, tie_word_embeddings=False),
    "biases and a linear predictor": lambda folder: save_qwen2_dms(folder),
}


def save_qwen2_dms(folder: Path) -> None:
    """Save a random Qwen2 with a linear predictor, as an export would."""
    from transformers import Qwen2Config

    from megatron_dms.hf import config_entries, modeling_dms
    from megatron_dms.hf.configuration_dms import DMSSettings

    torch.manual_seed(3)
    settings = DMSSettings(
        predictor="linear", window=WINDOW, alpha_scale=1.0, alpha_offset=0.0, target_cr=4.0
    )
    entries = config_entries("qwen2", settings)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = modeling_dms.Qwen2ForCausalLMDMS(Qwen2Config(**sizes, **heads, **entries))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def load_both_ways(rank: int, folder: Path, processes: int) -> None:
    """In process `rank`, load each model from HF and from the import at every layout, and compare the
    bits."""
    from megatron_dms.upstream import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dms.conversion.hf_folder import HFFolder
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
            # all chunks first: chunks that share an embedding communicate while they are built
            pairs = [[build(weights.args, stage) for _ in range(2)] for stage in stages]
            load_as_megatron_does([slow for _, slow in pairs], folder / f"{name}_megatron/release")
            for models in pairs:
                counted = 0
                weights.load([models[0]])
                wanted = own_bytes(models[0], weights.args.vocab_size)
                assert counted == wanted, f"rank {rank}: {counted} bytes read, {wanted} are its own"
                compare(models, weights.args.vocab_size, f"{name} TP {tp} PP {pp} VPP {virtual} rank {rank}")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def load_as_megatron_does(chunks: list, folder: Path) -> None:
    """Load all virtual stages of this rank from a torch_dist checkpoint."""
    from megatron.core import dist_checkpointing

    wanted = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def build(args, virtual_stage: int | None):
    """Build this rank's chunk of a GPTModel, with NaN as its weights."""
    from megatron_dms.conversion.parity.megatron_model import build_model

    model = build_model(args, virtual_stage)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def is_vocabulary(name: str) -> bool:
    """Whether a parameter has one row for each token of the vocabulary."""
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def real_rows(parameter: Tensor, vocab: int) -> int:
    """Return how many rows of this rank's part of a vocabulary are not padding."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    return min(max(vocab - rank * len(parameter), 0), len(parameter))


def own_bytes(model, vocab: int) -> int:
    """Return how many bytes of the file this rank holds, without padding."""
    total = 0
    for name, parameter in model.named_parameters():
        rows = real_rows(parameter, vocab) if is_vocabulary(name) else len(parameter)
        total += parameter[:rows].nbytes
    return total


def compare(models: list, vocab: int, where: str) -> None:
    """Assert that both chunks have the same parameters, and zeros as padding."""
    fast, slow = (dict(model.named_parameters()) for model in models)
    assert fast.keys() == slow.keys() and fast
    for name, parameter in fast.items():
        rows = real_rows(parameter, vocab) if is_vocabulary(name) else len(parameter)
        assert not parameter.isnan().any(), f"{where}: {name} was not filled"
        assert torch.equal(parameter[:rows], slow[name][:rows]), f"{where}: {name}"
        assert not parameter[rows:].any(), f"{where}: padding of {name}"


def test_every_rank_reads_its_own_slices_and_no_others(tmp_path: Path, fork_server: ForkServer) -> None:
    """Two processes load an odd vocabulary of 131 rows, padded to 132. Catches: heads of another rank, gate
    in place of up, a layer of another (virtual) stage, padding left as it was, a tied output layer of the
    last stage that is not filled, whole tensors read for a slice."""
    for name, make in SOURCES.items():
        make(tmp_path / name)
        import_hf(tmp_path / name, tmp_path / f"{name}_megatron")
    done = fork_server.spawn(load_both_ways, (tmp_path, 2), 2)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize(
    ("name", "processes", "layout"), [("hf_alone", 1, ()), ("hf_tp2_pp2", 4, (*TP, *PP))]
)
def test_a_run_from_an_hf_folder_is_the_run_from_its_import(
    name: str, processes: int, layout: tuple[str, ...], workspace: Workspace, reference: dict
) -> None:
    """Student and teacher are loaded from the HF folder. One process agrees bit for bit, four to 1e-5.
    Catches: an architecture that is not the folder's, a teacher or student left as it was initialised."""
    hf = ("--load-hf", str(workspace.hf), "--dms-teacher", str(workspace.hf))
    curves = workspace.run(name, processes, "no--pretrained-checkpoint", *hf, *layout)
    assert_same_curves(curves, reference, range(STEPS), TOLERANCE if layout else 0.0)


def test_what_was_loaded_from_hf_is_resumed_and_comes_back(workspace: Workspace, tmp_path: Path) -> None:
    """An adapter run at TP 2 x PP 2 starts from an HF folder, and the same command line resumes it. All
    tensors of the base model come back bit for bit. Catches: side files missing in --save, --load-hf taken
    for a new start although there is something to resume, padding exported, a layer or head out of place."""
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


def test_scaled_rope_reaches_student_and_teacher(workspace: Workspace, tmp_path: Path) -> None:
    """A yarn model reads texts of three times its original context at TP 2 with recomputation. The student
    evicts nothing, so its validated cross entropy is that of transformers' model, and the teacher agrees with
    the student. Catches: RoPE from Megatron's flags, or no attention factor, in student, teacher or both."""
    from transformers import AutoModelForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    save_qwen3(tmp_path / "hf", rope_parameters=yarn)
    flags = (
        *(
            "no--pretrained-checkpoint",
            "--load-hf",
            str(tmp_path / "hf"),
            "--dms-teacher",
            str(tmp_path / "hf"),
        ),
        *("--dms-predictor", "linear", "--dms-train", "predictor", "--lr", "1e-9", *TP),
        *("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
        *("--valid-data-path", str(workspace.data), "--eval-iters", "2", "--eval-interval", str(STEPS)),
    )
    curves = workspace.run("yarn", 2, *flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = cross_entropy(model, workspace)
    assert curves["LM loss validation"][0] == pytest.approx(expected, rel=1e-5)
    assert max(curves["KL validation"]) < 1e-9
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", rope_parameters=plain).eval()
    assert abs(cross_entropy(model, workspace) / expected - 1) > 1e-3, "the scaling must show"


@pytest.mark.parametrize(
    ("flags", "kind", "continues"),
    [
        ("--load {run}", "MegatronWeights", True),
        ("--load {run} --load-hf nowhere", "MegatronWeights", True),  # resumes, wherever it came from
        ("--load {run} --pretrained-checkpoint {base}", "MegatronWeights", True),
        ("--load {run} --finetune", "MegatronWeights", False),
        ("--load {empty} --load-hf {hf}", "HFWeights", False),
        ("--load {empty} --pretrained-checkpoint {base}", "MegatronWeights", False),
        ("--load {base} --load-hf {hf}", "two", False),
        ("--load {run} --finetune --load-hf {hf}", "two", False),
        ("--load {empty}", "no finished", False),
        ("--pretrained-checkpoint {hf}", "use --load-hf", False),
        ("--load-hf {hf} --ckpt-step 3", "drop it", False),
    ],
)
def test_what_a_run_starts_from(
    flags: str, kind: str, continues: bool, workspace: Workspace, tmp_path: Path
) -> None:
    """Catches: a run that is started anew instead of resumed, or the other way round; a folder that is
    ignored."""
    from megatron_dms.training.startup import starting_point

    shutil.copytree(workspace.base, run := tmp_path / "run")
    (run / "release").rename(run / "iter_0000005")
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "empty").mkdir()
    parser = argparse.ArgumentParser()
    for flag in ("--load", "--load-hf", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--ckpt-step", type=int)
    folders = {"run": run, "empty": tmp_path / "empty", "base": workspace.base, "hf": workspace.hf}
    args = parser.parse_args(flags.format(**folders).split())
    if not kind.endswith("Weights"):
        with pytest.raises(StartupError, match=kind if kind != "two" else "starts from one of them"):
            starting_point(args)
        return
    weights, resumes = starting_point(args)
    assert (type(weights).__name__, resumes) == (kind, continues)


def test_side_files_of_a_run_that_never_saved_are_replaced(workspace: Workspace, tmp_path: Path) -> None:
    """Catches: an export with the config.json, code and types of another model that --save began with."""
    from megatron_dms.training.startup import _carry_hf_files
    from megatron_dms.training.weights import HFWeights

    first, second = HFWeights(workspace.other_teacher), HFWeights(workspace.hf)
    save = tmp_path / "run"
    _carry_hf_files(first, save, continues=False)
    _carry_hf_files(second, save, continues=False)
    ours = (workspace.hf / "config.json").read_bytes()
    assert (save / "hf/config.json").read_bytes() == ours
    _carry_hf_files(first, save, continues=True)  # a run that goes on keeps what it has
    assert (save / "hf/config.json").read_bytes() == ours
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    _carry_hf_files(second, save, continues=False)
    with pytest.raises(StartupError, match="another model's checkpoints"):
        _carry_hf_files(first, save, continues=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be written"):
        _carry_hf_files(first, tmp_path / "file" / "run", continues=False)
