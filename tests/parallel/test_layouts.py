"""Layout never changes the result: each layout of ranks is compared with one process.

Each of six steps is compared in its loss, KL, compression loss, achieved CR (soft and hard), CR of the least
and of the most compressed layer, and gradient norm, to 1e-5 relative. The numbers of the sixth step depend on
five updates of the weights, so every entry of the gradients has its effect on them.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.comparison import TOLERANCE, assert_same_curves
from tests.support.forking import ForkServer
from tests.support.retrofit import STEPS, Workspace

Curves = dict[str, list[float]]
TP, PP = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
CP, VPP = ("--context-parallel-size", "2"), (*PP, "--num-virtual-stages-per-pipeline-rank", "2")
FULL_RECOMPUTE = (
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
)

LAYOUTS = {
    "tp2": (2, *TP),
    "pp2": (2, *PP),
    "tp2_pp2": (4, *TP, *PP),
    "tp2_sequence_parallel": (2, *TP, "--sequence-parallel"),
    "dp2": (2,),
    "dp2_distributed_optimizer": (2, "--use-distributed-optimizer"),
    "one_microbatch_of_twice_the_size": (1, "--micro-batch-size", "4"),
}
RECOMPUTE = {
    "selective": (1, "--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
    "full": (1, *FULL_RECOMPUTE),
}
BACKENDS = {
    "flash": (4, *TP, *PP),
    "triton": (2, *TP, "--sequence-parallel", "--recompute-granularity", "selective"),
}
# This length has 2 x CP equal parts, as CP 2 and CP 4 need, and is still no multiple of a kernel's block.
LONGER = ("--seq-length", "56")
LONGER_LAYOUTS = {
    "cp4_one_kv_head_on_two_ranks": (4, "--context-parallel-size", "4"),
    "tp2_cp2_sequence_parallel_fused": (4, *TP, *CP, "--sequence-parallel", "--dms-fuse-output-layer"),
    "cp2_dp2_distributed_optimizer_selective": (
        *(4, *CP, "--use-distributed-optimizer"),
        *("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
    ),
    "vpp2_four_microbatches": (2, *VPP, "--micro-batch-size", "1"),
    "vpp2_cp2_full_recompute": (4, *VPP, *CP, *FULL_RECOMPUTE),
}
VARIANTS = {
    "linear_self_teacher": (
        *("--dms-predictor", "linear", "--dms-train", "predictor", "--dms-teacher", "self"),
        *("--lr", "3e-2"),  # W starts at 0 and moves by this per step
    ),
    "key_channel_per_layer_student_teacher": (
        *("--dms-predictor", "key_channel", "--dms-granularity", "layer", "--dms-kl", "student_teacher"),
        *("--dms-lag", "0", "--dms-anneal", "fraction"),
    ),
    "query_channel_per_layer_rows_only_after_zeroing": (
        *("--dms-granularity", "layer", "--dms-train", "predictor", "--dms-zeroing-steps", "3"),
        *("--lr", "3e-2", *FULL_RECOMPUTE),
    ),
    "merging": (
        *("--dms-method", "merge", "--dms-predictor", "key_channel", "--dms-window", "0"),
        *("--dms-zeroing-steps", "2"),
    ),
}
VARIANT_LAYOUTS = {  # four processes each
    "linear_self_teacher": (*TP, *VPP),
    "key_channel_per_layer_student_teacher": (*TP, *CP),
    "query_channel_per_layer_rows_only_after_zeroing": (*VPP, *CP),
    "merging": (*TP, *CP),
}

INTERPRETED = {"TRITON_INTERPRET": "1"}
VALIDATION = ("--eval-iters", "2", "--eval-interval", str(STEPS))
VALIDATION_SCALARS = ("KL", "compression loss", "achieved CR (hard)", "LM loss")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, workspace: Workspace, reference: Curves) -> None:
    """Catches noise by rank (local head or sample numbers), the compression clamp per stage or per
    tensor-parallel rank, a loss normalised per microbatch, vocabulary padding in the KL, and gradients that
    are summed over the wrong ranks."""
    assert max(reference["compression loss"]) > 0, "the clamp must be active, or it is not tested"
    assert_same_curves(workspace.run(name, *LAYOUTS[name]), reference, range(STEPS), TOLERANCE)


def test_torchrun_starts_the_run_that_is_forked_elsewhere(workspace: Workspace) -> None:
    """Every logged scalar, bit for bit. Catches forked ranks that train another run than torchrun's."""
    forked = workspace.run("forked", *LAYOUTS["tp2"])
    assert replace(workspace, server=None).run("torchrun", *LAYOUTS["tp2"]) == forked
    assert len(forked) > 20


@pytest.fixture(scope="module")
def longer_reference(workspace: Workspace) -> Curves:
    return workspace.run(
        "longer_reference", 1, *LONGER, *VALIDATION, "--valid-data-path", str(workspace.data)
    )


@pytest.mark.parametrize("name", LONGER_LAYOUTS)
def test_context_parallelism_and_virtual_stages_equal_one_process(
    name: str, workspace: Workspace, longer_reference: Curves
) -> None:
    """Validation is compared too. Catches: keys, decisions or noise that follow a rank's own token numbers,
    chunks whose order is not that of the rotary table, a KV head on several ranks that counts several times
    or never, an account that leaves context-parallel ranks out, gradients that are averaged where they
    should be summed, a stage whose microbatch is not that of its account, a stage in the middle taken for
    the last."""
    data = ("--valid-data-path", str(workspace.data))
    curves = workspace.run(name, *LONGER_LAYOUTS[name], *LONGER, *VALIDATION, *data)
    assert_same_curves(curves, longer_reference, range(STEPS), TOLERANCE)
    for name in (f"{scalar} validation" for scalar in VALIDATION_SCALARS):
        assert curves[name] == pytest.approx(longer_reference[name], rel=TOLERANCE), name


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_changes_nothing(name: str, workspace: Workspace, reference: Curves) -> None:
    """The curves agree bit for bit. Catches decisions that are counted twice, noise that is drawn anew, and a
    decision logit that the recomputed region closes over instead of taking as an input."""
    assert_same_curves(workspace.run(name, *RECOMPUTE[name]), reference, range(STEPS), 0.0)


@pytest.fixture(scope="module")
def interpreting(workspace: Workspace) -> Iterator[Workspace]:
    """A workspace whose ranks interpret Triton's kernels: Triton reads the setting when it is imported."""
    if workspace.server is None:
        yield workspace
        return
    with ForkServer(INTERPRETED) as server:
        yield replace(workspace, server=server)


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_backend_equals_dense(
    name: str, interpreting: Workspace, reference: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layouts differ too. Catches a back-end that is not the one named, a layout of memory that it
    misreads, and gradients that recomputation loses."""
    for variable, value in INTERPRETED.items():
        monkeypatch.setenv(variable, value)
    curves = interpreting.run(f"backend_{name}", *BACKENDS[name], "--dms-attention-backend", name)
    assert_same_curves(curves, reference, range(STEPS), TOLERANCE)
    log = (interpreting.folder / f"backend_{name}.log").read_text()
    assert f"DMS attention in training: {name}" in log


@pytest.mark.parametrize("layout", [(1,), (4, *TP, *PP), (2, *TP, "--sequence-parallel")], ids=len)
def test_fused_output_layer_equals_logits(layout: tuple, workspace: Workspace, reference: Curves) -> None:
    """Embeddings are tied, and the vocabulary is padded differently at TP 2. Catches: gradients of hidden
    states that are not added up over ranks, or are added twice with sequence parallelism, tokens weighted in
    another order, a gradient of the output layer that the optimizer does not get, a flag that is accepted and
    ignored."""
    name = f"fused_{len(layout)}"
    curves = workspace.run(name, *layout, "--dms-fuse-output-layer")
    assert_same_curves(curves, reference, range(STEPS), TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_on_four_ranks_equals_one_process(name: str, workspace: Workspace) -> None:
    """TP, CP or virtual stages are compared with one process for the other predictors, one decision per
    layer, training of the borrowed rows alone, the zeroing phase, a teacher that shares the student's
    weights, and merging. Catches a layer's decision that is not head 0's on every rank, a row that is zeroed
    or trained on the wrong rank or in one virtual stage only, pairs merged within a rank's part of the
    sequence only, and a teacher whose activations are cut at the wrong place between stages."""
    flags = (*VARIANTS[name], *LONGER)
    alone = workspace.run(f"{name}_alone", 1, *flags)
    assert alone["KL"][0] != alone["KL"][-1], "the run must learn something, or gradients are not tested"
    curves = workspace.run(name, 4, *VARIANT_LAYOUTS[name], *flags)
    assert_same_curves(curves, alone, range(STEPS), TOLERANCE)


def test_validation_and_a_teacher_of_another_size(workspace: Workspace) -> None:
    """TP 2 x PP 2 is compared with one process. Decisions are hard, the teacher is a HF folder (other hidden
    size, layers and head size; untied), and heat maps are in TensorBoard's and W&B's folders. Catches the
    activations of student and teacher cut apart at the wrong width between stages, soft decisions in
    evaluation, and a validation normalised by rank."""
    data = ("--valid-data-path", str(workspace.data), "--dms-teacher", str(workspace.other_teacher))
    curves = {}
    for name, processes, layout in (("validation_alone", 1, ()), ("validation", 4, (*TP, *PP))):
        folder = workspace.folder / f"save_{name}"
        save = ("--save", str(folder), "--save-interval", "100")
        wandb = ("--wandb-project", "tests", "--wandb-exp-name", name, "--wandb-save-dir", str(folder))
        curves[name] = workspace.run(name, processes, *layout, *VALIDATION, *data, *save, *wandb)
        pictures = [
            workspace.folder / "boards" / name / "pictures" / f"kept_fraction_{STEPS:07d}.png",
            *folder.glob("wandb/**/media/images/kept fraction_*.png"),
        ]
        assert len(pictures) > 1, "W&B, which runs offline here, has no heat map"
        assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    alone, together = curves["validation_alone"], curves["validation"]
    assert_same_curves(together, alone, range(STEPS), TOLERANCE)
    for name in (f"{scalar} validation" for scalar in VALIDATION_SCALARS):
        assert together[name] == pytest.approx(alone[name], rel=TOLERANCE), name
    assert alone["achieved CR (hard) validation"][0] > 1.01


def test_validation_of_a_student_that_evicts_nothing_is_exact(workspace: Workspace) -> None:
    """An untrained linear predictor evicts nothing, so student and teacher agree: the KL is below 1e-9.
    Catches logits that the validation's cross entropy overwrites before the KL reads them, and a teacher that
    does not share the student's weights."""
    flags = (*VARIANTS["linear_self_teacher"], "--lr", "1e-9", "--valid-data-path", str(workspace.data))
    curves = workspace.run("untrained", 1, *flags, *VALIDATION, "--train-iters", str(STEPS))
    assert set(curves["achieved CR (hard) validation"]) == {1.0}
    assert max(curves["KL validation"]) < 1e-9
    assert min(curves["LM loss validation"]) > 1  # labels are random: the loss is of the order of log 131
