"""torchrun, ending with the status of the rank that failed first. torchrun itself always ends with 1.

    python -m megatron_dms.launch.elastic [torchrun's options] SCRIPT [its options]

If a signal ended the rank, the status is 128 + the signal's number, as in a shell.
"""

import sys


def main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        status = error.get_first_failure()[1].exitcode
        raise SystemExit(status if status > 0 else 128 - status) from None


if __name__ == "__main__":
    main()
