"""The models of recipes, on the meta device, in a fake process group of their real size: what pretrain_dms.py
does up to the wrapping in DDP, without a byte of weights.

    python recipe_builds.py CASES.json OUT.json

CASES: name -> {flags, ranks, ranks_to_build}; OUT: name -> a list with what each rank has, or an error. Each
rank is a forked child, as Megatron's state belongs to a process. Runs in a folder with hf/ and data/.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from traceback import format_exc

for absent in ("transformer_engine", "apex"):  # both allocate on a GPU, whatever the default device
    sys.modules[absent] = None  # type: ignore[assignment]

from megatron_dms.upstream import cpu  # noqa: E402

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_dms.errors import StartupError  # noqa: E402
from megatron_dms.training import weights  # noqa: E402
from megatron_dms.training.build import student_config  # noqa: E402
from megatron_dms.training.startup import check, open_outputs, parse  # noqa: E402

_SAID = (
    "lr adam_beta1 adam_beta2 clip_grad weight_decay bf16 seq_length global_batch_size train_iters "
    "use_distributed_optimizer accumulate_allreduce_grads_in_fp32 data_parallel_size sequence_parallel "
    "recompute_granularity"
).split()


def start(flags: list[str], world_size: int, rank: int) -> tuple[Namespace, torch.nn.Module]:
    """Return the checked arguments, and the student with its teacher as DDP would get it."""
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank % 8))
    sys.argv[1:] = flags
    run = check(parse())
    open_outputs(run)
    args = run.args
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        create_gloo_process_groups=False,  # gloo would look for the other ranks
    )
    weights.HFWeights.load = lambda self, model: None  # there are none
    config = student_config(run)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        model = config.get_builder_cls()(config).build_model(
            groups, groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
        )
        for hook in config.pre_wrap_hooks:
            (model,) = hook([model])
    return args, model


def described(args: Namespace, model: torch.nn.Module) -> dict[str, object]:
    """Describe a model as JSON."""
    return {
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "microbatches": get_num_microbatches(),
        "args": {name: getattr(args, name) for name in _SAID},
        "parameters": [
            [name, list(parameter.shape), parameter.element_size(), parameter.requires_grad]
            for name, parameter in model.named_parameters()
            if parameter.is_meta
        ],
        "not on meta": [name for name, parameter in model.named_parameters() if not parameter.is_meta],
    }


def in_child(flags: list[str], world_size: int, rank: int, out: Path) -> object:
    """Return the description of one rank's model, or its error, from a forked child."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return json.loads(out.read_text())
    try:
        found: object = described(*start(flags, world_size, rank))
    except StartupError as error:
        found = f"StartupError: {error}"
    except BaseException:
        found = format_exc()
    out.write_text(json.dumps(found))
    os._exit(0)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    part = out.with_suffix(".part")
    found = {
        name: [in_child(case["flags"], case["ranks"], rank, part) for rank in case["ranks_to_build"]]
        for name, case in cases.items()
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
