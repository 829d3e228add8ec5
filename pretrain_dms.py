"""Retrofit a pretrained LLM with Dynamic Memory Sparsification through Megatron's own training loop.

    torchrun --nproc-per-node 4 pretrain_dms.py --pretrained-checkpoint BASE --dms-teacher BASE \
        --load OUT --save OUT --data-path DATA --tensor-model-parallel-size 2 ...

All of Megatron's flags, plus --dms-* (see docs/flags.md or --help). The architecture comes from the
checkpoint.
"""

import os
import sys
import time

SILENT_RANKS_WAIT = 60  # seconds at most: torchrun ends the wait once local rank 0 has failed


def main() -> None:
    from megatron_dms.errors import StartupError
    from megatron_dms.training.startup import check_dms_flags

    try:
        dms = check_dms_flags(sys.argv[1:])
        import torch

        if not torch.cuda.is_available():
            from megatron_dms.upstream import cpu

            cpu.install()
        from megatron_dms.training.startup import parse_megatron_args
        from megatron_dms.upstream.wheel import skip_helper_compilation

        skip_helper_compilation()
        args, start, teacher = parse_megatron_args(dms)
    except StartupError as error:
        # One line for each node, as a file may be missing on one of them only. torchrun ends all ranks as
        # soon as one fails, so those that say nothing wait for the one that speaks.
        if error.one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"pretrain_dms.py: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SILENT_RANKS_WAIT)
        raise SystemExit(2) from None

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_dms.data.dataset import train_valid_test_datasets_provider
    from megatron_dms.resilience.verified_saves import Checkpoints
    from megatron_dms.resilience.watchdog import Watchdog
    from megatron_dms.training.build import student_config
    from megatron_dms.training.step import RetrofitStep

    with Watchdog.of_run(dms, args) as watchdog:
        Checkpoints(dms.keep_checkpoints, start is None, watchdog).install()
        step = RetrofitStep(dms, watchdog)
        model = student_config(args, dms, start, teacher)
        model.pre_wrap_hooks.append(step.attach)
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            step,
            non_loss_data_func=step.after_validation,
        )


if __name__ == "__main__":
    main()
