"""Plan a retrofit, or what to serve, before anything runs. This is arithmetic; it needs no GPU and no torch.

    megatron-dms plan train --model qwen-r1-32b --ranks 1024     memory per rank, time, the best layout
    megatron-dms plan serve --model qwen3-8b --milliseconds 20   the W-L-CR that fit
    megatron-dms plan check                                      predictions against measurements, with errors

Every answer prints the numbers it used. docs/planning.md says what is not modelled, and how far off it is.

Progress goes to stderr; stdout gets tables, and JSON on the last line (bytes and seconds). Bad input: one
line `error: ...` on stderr, exit status 2; interrupted: 130.
"""

import argparse
import json
from dataclasses import asdict, replace

from megatron_dms.cli.plan_options import assumptions, make_parser
from megatron_dms.command_line import exit_status, say, tool_parser
from megatron_dms.planning import calibration, tables
from megatron_dms.planning.devices import DEVICES, Device
from megatron_dms.planning.job import RECIPES, Job
from megatron_dms.planning.models import ModelSize, of_folder, preset
from megatron_dms.planning.search import find_layouts, steps_to, with_recompute
from megatron_dms.planning.serving import Serving, longest

PROGRAM = "megatron-dms plan"
_LAYOUT = ("tp", "pp", "cp", "dp", "micro", "recompute", "sp")


def _model(options: argparse.Namespace) -> ModelSize:
    return of_folder(options.hf) if options.hf else preset(options.model)


def _device(options: argparse.Namespace) -> Device:
    if options.device not in DEVICES:
        raise ValueError(f"--device is {options.device!r}, expected one of {', '.join(DEVICES)}")
    device = DEVICES[options.device]
    return replace(device, memory=options.memory * 1e9) if options.memory else device


def _job(options: argparse.Namespace) -> Job:
    model = _model(options)
    sizes = {}
    for name in ("context", "batch"):
        sizes[name] = getattr(options, name) or getattr(model, name)
        if not sizes[name]:
            raise ValueError(f"{model.name} is no preset: give --{name} N")
    return Job(
        model,
        RECIPES[options.recipe],
        **sizes,
        fuse_output_layer=options.fuse_output_layer,
        distributed_optimizer=options.distributed_optimizer,
        logits_bytes={"bf16": 2, "fp32": 4}[options.logits],
    )


def _train(options: argparse.Namespace) -> dict[str, object]:
    job, device, assumed = _job(options), _device(options), assumptions(options)
    fixed = {name: getattr(options, name) for name in _LAYOUT if getattr(options, name) is not None}
    say(f"trying the layouts of {options.ranks} ranks ...")
    found = find_layouts(job, options.ranks, device, assumed, fixed)
    if not found.plans:
        needed = found.least.memory
        parts = asdict(needed)
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"none of {found.tried} layouts of {options.ranks} ranks fits into {device.memory / 1e9:g} GB: "
            f"the least takes {needed.total / 1e9:.1f} GB ({found.least.layout}), "
            f"{parts[largest] / 1e9:.1f} of it {largest}; use more ranks"
        )
    best = found.plans[0]
    steps = {cr: steps_to(cr, options.steps_per_cr, options.zeroing_steps) for cr in options.cr}
    each = with_recompute(job, best, device, assumed)
    model = job.model
    print(
        f"{model.name}, {model.parameters():,} parameters; {job.recipe.name}, {job.context} tokens x "
        f"{job.batch} samples, {'fused output layer' if job.fuse_output_layer else 'whole logits'}; "
        f"{options.ranks} ranks"
    )
    print(tables.numbers_used(device, assumed, device.memory))
    if options.price is not None:
        print(f"  price, as given: {options.price:g} USD for a device and hour")
    print(f"\n{len(found.plans)} of {found.tried} layouts fit; the fastest:")
    print(tables.plan_rows(found.plans[: options.show], steps, options.price))
    print(f"\nmemory of {best.layout}, and with other recompute:")
    print(tables.memory_rows(each, device.memory))
    print("\n" + tables.time_rows(best))
    return {
        "model": asdict(model) | {"parameters": model.parameters()},
        "recipe": asdict(job.recipe),
        "context": job.context,
        "batch": job.batch,
        "fuse_output_layer": job.fuse_output_layer,
        "distributed_optimizer": job.distributed_optimizer,
        "logits_bytes": job.logits_bytes,
        "device": asdict(device),
        "assumptions": asdict(assumed),
        "steps": {f"{cr:g}": count for cr, count in steps.items()},
        "tried": found.tried,
        "fit": len(found.plans),
        "price": options.price,
        "best": [tables.plan_json(plan, steps, options.price) for plan in found.plans[: options.show]],
        "recompute": {plan.layout.recompute: tables.plan_json(plan, steps, options.price) for plan in each},
    }


def _serve(options: argparse.Namespace) -> dict[str, object]:
    model, device, assumed = _model(options), _device(options), assumptions(options)
    serving = Serving(
        *(model, device, assumed, options.tp, options.window),
        fixed_seconds=options.fixed_milliseconds / 1e3,
    )
    fits = [
        longest(serving, chains, cr, device.memory, options.milliseconds / 1e3)
        for cr in options.cr
        for chains in options.chains
    ]
    print(
        f"{model.name} in bf16 on {options.tp} device(s): {serving.weight_bytes / 1e9:.2f} GB of weights and "
        f"{serving.pair_bytes(1) / 1e3:.1f} KB for each token on each; window {options.window}; at most "
        f"{device.memory / 1e9:g} GB and {options.milliseconds:g} ms a step"
    )
    print(tables.numbers_used(device, assumed, device.memory) + " (of training only)")
    print("\nW chains of L tokens, the prompt among them; a step at their end makes a token of each:")
    print(tables.fit_rows(fits))
    return {
        "model": asdict(model) | {"parameters": model.parameters()},
        "device": asdict(device),
        "assumptions": asdict(assumed),
        "tp": options.tp,
        "window": options.window,
        "memory_bytes": device.memory,
        "seconds": options.milliseconds / 1e3,
        "fixed_seconds": serving.fixed_seconds,
        "fits": [asdict(fit) for fit in fits],
    }


def _check(options: argparse.Namespace) -> dict[str, object]:
    assumed, device = assumptions(options), DEVICES["h100"]
    found = calibration.trainings(assumed)
    bandwidth, caches, steps = calibration.decoding()
    others = caches + calibration.largest_batches() + calibration.demo()
    print(tables.numbers_used(device, assumed, device.memory) + "\n")
    print(tables.training_rows(found, assumed) + "\n")
    print(tables.compared_rows(others) + "\n")
    print(
        f"decode steps on two CPU cores; bytes over {bandwidth / 1e9:.1f} GB/s, the bandwidth that the first "
        "row gives:"
    )
    print(tables.compared_rows(steps) + "\n")
    print("not compared:")
    for what, why in calibration.NOT_COMPARED.items():
        print(f"  {what}: {why}")
    trained = [row.run._asdict() | {"layout": str(row.plan.layout), "utilization": row.utilization} | {
        kind: tables.compared_json(getattr(row, kind)) for kind in ("roofline", "expected", "left_out")
    } for row in found]  # fmt: skip
    return {
        "device": asdict(device),
        "assumptions": asdict(assumed),
        "fitted_slowdown": calibration.fitted_slowdown(found),
        "training": trained,
        "cpu_bandwidth": bandwidth,
        "compared": [tables.compared_json(row) for row in others + steps],
    }


COMMANDS = {"train": _train, "serve": _serve, "check": _check}


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command; the return value is the exit status."""
    options = make_parser(tool_parser(__doc__, PROGRAM, program)).parse_args(argv)
    return exit_status(lambda: print(json.dumps(COMMANDS[options.command](options))))
