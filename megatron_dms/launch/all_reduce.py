"""One process of the preflight's all-reduce. preflight.py starts one per GPU and ends the ones that hang.

    python -m megatron_dms.launch.all_reduce --host HOST --port PORT --rank R --world W --local-rank L ...

It prints one JSON line. Any failure is a traceback and an exit status other than 0.
"""

import argparse
import json
import time
from datetime import timedelta

_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 16}  # 256 MB per GPU, so that a lame link shows in the seconds
_REPEATS = 3


def all_reduce(options: argparse.Namespace) -> dict[str, float]:
    """Sum rank + 1 over all ranks several times -> the seconds of the last sum, when all connections stand.

    Raises:
        RuntimeError: the sum is wrong, or the ranks do not meet within the time limit.
    """
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=options.seconds)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", options.local_rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore(options.host, options.port, is_master=False, timeout=limit)
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        store=dist.PrefixStore("all_reduce", store),
        rank=options.rank,
        world_size=options.world,
        timeout=limit,
    )
    expected = options.world * (options.world + 1) / 2
    for _ in range(_REPEATS):
        values = torch.full((_ELEMENTS[options.device],), options.rank + 1.0, device=device)
        begin = time.monotonic()
        dist.all_reduce(values)
        low, high = values.min().item(), values.max().item()
        seconds = time.monotonic() - begin
        if low != expected or high != expected:
            raise RuntimeError(f"the sum over {options.world} ranks is {low} to {high}, expected {expected}")
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    for name in ("port", "rank", "world", "local-rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(all_reduce(parser.parse_args())))


if __name__ == "__main__":
    main()
