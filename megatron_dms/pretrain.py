"""Retrofit a pretrained LLM with Dynamic Memory Sparsification through Megatron's own training loop.

    torchrun --nproc-per-node 4 -m megatron_dms.pretrain --pretrained-checkpoint BASE --dms-teacher BASE \
        --load OUT --save OUT --data-path DATA --tensor-model-parallel-size 2 ...

pretrain_dms.py starts this module from a clone. The command takes all of Megatron's flags and the --dms-*
flags (see docs/flags.md or --help). The architecture comes from the checkpoint.
"""

import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron_dms.errors import StartupError
    from megatron_dms.resilience.ownership import Owner
    from megatron_dms.training.startup import Run

SILENT_RANKS_WAIT = 60  # seconds at most: torchrun ends the wait once local rank 0 has failed


def main() -> None:
    """Parse the command line, check the flags and the checkpoints, open the logs, and train."""
    from megatron_dms.errors import StartupError
    from megatron_dms.training import startup

    try:
        run = startup.parse()
        run = startup.check(run)
        owner = startup.open_outputs(run)
    except StartupError as error:
        _exit(error)
    _train(run, owner)


def _exit(error: "StartupError") -> NoReturn:
    """End this rank with one line for each node, as a file may be missing on one node only.

    torchrun ends all ranks as soon as one fails, so the ranks that say nothing wait for the one that speaks.
    """
    if error.one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"pretrain_dms.py: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SILENT_RANKS_WAIT)
    raise SystemExit(2) from None


def _train(run: "Run", owner: "Owner | None") -> None:
    """Hand the student with its teacher, the data and the forward step to Megatron's training loop."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_dms.data.dataset import train_valid_test_datasets_provider
    from megatron_dms.resilience.verified_saves import Checkpoints
    from megatron_dms.resilience.watchdog import Watchdog
    from megatron_dms.training.build import student_config
    from megatron_dms.training.step import RetrofitStep

    with Watchdog.of_run(run.dms, run.args) as watchdog:
        Checkpoints(run.dms.keep_checkpoints, run.continues, watchdog, owner).install()
        step = RetrofitStep(run.dms, watchdog)
        model = student_config(run)
        model.pre_wrap_hooks.append(step.attach)
        pretrain(
            pretrain_cfg_container_from_args(run.args, model),
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            step,
            non_loss_data_func=step.after_validation,
        )


if __name__ == "__main__":
    main()
