"""What must divide what before a run starts: layouts that run, and one line for each that does not."""

from argparse import Namespace

import pytest

from megatron_dms.errors import StartupError
from megatron_dms.training.layout import check_heads_and_layers, check_layout, virtual_stages

RUN = {
    **{"world_size": 8, "seq_length": 48, "sequence_parallel": False, "num_layers": 12},
    **{"num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 40},
    **{"micro_batch_size": 1, "global_batch_size": 16},
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1},
    **{"num_virtual_stages_per_pipeline_rank": None, "num_layers_per_virtual_pipeline_stage": None},
    **{"microbatch_group_size_per_vp_stage": None, "rampup_batch_size": None, "eval_iters": 0},
    **{"eval_global_batch_size": None, "eval_micro_batch_size": None},
}
SHORT = {
    **{"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"},
    **{"cp": "context_parallel_size", "vpp": "num_virtual_stages_per_pipeline_rank"},
    **{"each": "num_layers_per_virtual_pipeline_stage", "group": "microbatch_group_size_per_vp_stage"},
    "batch": "global_batch_size",
}


def run(**changes: object) -> Namespace:
    return Namespace(**RUN | {SHORT.get(name, name): value for name, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"cp": 2},
        {"tp": 2, "cp": 4, "num_attention_heads": 24, "num_query_groups": 2},  # one KV head on four ranks
        {"tp": 2, "cp": 2, "sequence_parallel": True},
        {"pp": 2, "vpp": 3, "tp": 2},
        {"pp": 2, "each": 2, "cp": 2},
        {"pp": 4, "vpp": 3, "batch": 8},
        {"pp": 2, "vpp": 2, "batch": 28, "group": 5},  # the remaining 2 of 7 are PP
        {"pp": 2, "vpp": 2, "eval_iters": 1, "eval_global_batch_size": 8},
    ],
    ids=str,
)
def test_what_runs(changes: dict) -> None:
    """Catches: a layout that is refused though Megatron and the exchange of heads can run it."""
    check_layout(run(**{"num_layers": 12} | changes))


REFUSED = [
    ({"cp": 3}, "12 query and 4 KV heads on each tensor-parallel rank to share out; use one of 1, 2, 4, 12"),
    (
        {"tp": 2, "cp": 4},
        "6 query and 2 KV heads on each tensor-parallel rank to share out; use one of 1, 2, 6",
    ),
    ({"tp": 3}, "--tensor-model-parallel-size is 3, but the model has num_query_groups = 4"),
    (
        {"tp": 4, "ffn_hidden_size": 42},
        "--tensor-model-parallel-size is 4, but the model has ffn_hidden_size = 42",
    ),
    ({"cp": 4, "seq_length": 36}, "--seq-length is 36, but --context-parallel-size 4 cuts it into 8 parts"),
    (
        {"tp": 4, "cp": 2, "num_attention_heads": 8, "sequence_parallel": True, "seq_length": 44},
        "--sequence-parallel at TP 4 x CP 2 needs a multiple of 8",
    ),
    ({"pp": 2, "cp": 2, "world_size": 6}, "6 processes, but TP 1 x PP 2 x CP 2 needs a multiple of 4"),
    ({"pp": 8}, "--pipeline-model-parallel-size is 8, but the model has 12 layers"),
    ({"pp": 2, "vpp": 4}, "PP 2 x 4 virtual stages, but the model has 12 layers"),
    ({"pp": 2, "each": 4}, "--num-layers-per-virtual-pipeline-stage is 4"),
    ({"pp": 2, "each": 3, "vpp": 2}, "use one of them"),
    ({"pp": 4, "vpp": 3, "batch": 4}, "--global-batch-size 4 makes 2 microbatches on each pipeline"),
    ({"pp": 4, "vpp": 3, "batch": 12}, "virtual stages take 4 at a time; use a multiple of 8"),
    ({"pp": 2, "vpp": 3, "rampup_batch_size": ["8", "4", "99"]}, "--rampup-batch-size 12 makes 3"),
    ({"pp": 2, "vpp": 3, "eval_iters": 1, "eval_global_batch_size": 4}, "--eval-global-batch-size 4"),
    (
        {"pp": 4, "vpp": 3, "group": 3},
        "--microbatch-group-size-per-virtual-pipeline-stage is 3, expected PP 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_does_not_run(changes: dict, message: str) -> None:
    """Catches: a check that is missing, so that Megatron stops in the middle of the first step, or heads that
    are cut unevenly."""
    with pytest.raises(StartupError) as caught:
        check_layout(run(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_teacher_is_checked_with_the_students_stages() -> None:
    """Catches: virtual stages counted from the teacher's own number of layers."""
    args = run(pp=2, each=2)  # 12 layers: three virtual stages
    assert virtual_stages(args) == 3
    teacher = Namespace(num_layers=6, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=10)
    check_heads_and_layers(args, teacher, "the teacher")
    teacher.num_layers = 8
    with pytest.raises(StartupError, match="PP 2 x 3 virtual stages, but the teacher has 8 layers"):
        check_heads_and_layers(args, teacher, "the teacher")
