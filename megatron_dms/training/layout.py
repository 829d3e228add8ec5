"""How a run is spread over its processes: what must divide what, before anything starts.

TP, CP, PP: sizes of tensor, context and pipeline parallelism. Every check raises StartupError with one line
that says what was found, what was expected, and the fix.
"""

from argparse import Namespace

from megatron_dms import layout_rules as rules
from megatron_dms.errors import StartupError


def check_layout(args: Namespace) -> None:
    """Check that processes, sequence, heads, layers and microbatches divide by the layout."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    check_heads_and_layers(args, args)
    data_parallel = rules.data_parallel_size(args.world_size, tp, pp, cp)
    if data_parallel is None:
        raise StartupError(
            f"{args.world_size} processes, but TP {tp} x PP {pp} x CP {cp} needs a multiple of {tp * pp * cp}"
        )
    parts = rules.sequence_parts(cp)
    if args.seq_length % parts:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but --context-parallel-size {cp} cuts it into {parts} "
            f"parts; use a multiple of {parts}"
        )
    multiple = rules.sequence_parallel_multiple(tp, cp)
    if args.sequence_parallel and args.seq_length % multiple:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but --sequence-parallel at TP {tp} x CP {cp} needs a "
            f"multiple of {multiple}"
        )
    if virtual_stages(args) > 1:
        _check_microbatches(args, data_parallel)


def virtual_stages(args: Namespace) -> int:
    """Return the number of virtual stages of each pipeline rank, from either of Megatron's flags; 1 without
    them."""
    pp, each = args.pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage
    if each is None:
        return args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_virtual_stages_per_pipeline_rank is not None:
        raise StartupError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank: use one of "
            "them"
        )
    if args.num_layers % (pp * each):
        raise StartupError(
            f"--num-layers-per-virtual-pipeline-stage is {each}, but PP {pp} stages of {each} layers do not "
            f"divide the model's {args.num_layers}; use a divisor of {args.num_layers // pp}"
        )
    return args.num_layers // (pp * each)


def check_heads_and_layers(args: Namespace, model: Namespace, whose: str = "the model") -> None:
    """Check that heads, MLP channels and layers of the student or the teacher divide by the layout."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    pp = args.pipeline_model_parallel_size
    heads, groups, ffn = (getattr(model, name) for name in names)
    *by_tp, layers = rules.model_divisions(heads, groups, ffn, model.num_layers, tp, pp)
    for name, division in zip(names, by_tp, strict=True):
        if not division.exact:
            size = division.number
            fewer = ": several ranks would share one KV head's decision" if size < tp else ""
            raise StartupError(
                f"--tensor-model-parallel-size is {tp}, but {whose} has {name} = {size}, which it must "
                f"divide{fewer}; use a divisor of {size}"
            )
    heads, groups = model.num_attention_heads // tp, model.num_query_groups // tp
    possible = [c for c in range(1, heads + 1) if rules.heads_can_be_shared(heads, groups, c)]
    if cp not in possible:
        raise StartupError(
            f"--context-parallel-size is {cp}, but {whose} has {heads} query and {groups} KV heads on each "
            f"tensor-parallel rank to share out; use one of {', '.join(map(str, possible))}"
        )
    stages = virtual_stages(args)
    if not layers.exact:
        raise StartupError(
            f"--pipeline-model-parallel-size is {pp}, but {whose} has {model.num_layers} layers, which it "
            f"must divide; use a divisor of {model.num_layers}"
        )
    if model.num_layers % (pp * stages):
        raise StartupError(
            f"PP {pp} x {stages} virtual stages, but {whose} has {model.num_layers} layers, which their "
            f"product must divide; use a divisor of {model.num_layers // pp} as number of virtual stages"
        )


def _check_microbatches(args: Namespace, data_parallel: int) -> None:
    """Check for virtual stages what Megatron's interleaved schedule would say only once a step begins."""
    pp = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage
    group = pp if group is None else group
    if group < pp:
        raise StartupError(
            f"--microbatch-group-size-per-virtual-pipeline-stage is {group}, expected PP {pp} or more"
        )
    micro = args.micro_batch_size
    if not micro:
        return  # Megatron asks for it
    batch = args.global_batch_size or micro * data_parallel
    batches = [("--global-batch-size", batch, micro)]
    if args.rampup_batch_size:
        start, step = (int(number) for number in args.rampup_batch_size[:2])
        batches += [("--rampup-batch-size", size, micro) for size in range(start, batch, max(step, 1))]
    if args.eval_iters:
        evaluated = args.eval_global_batch_size or batch
        batches.append(("--eval-global-batch-size", evaluated, args.eval_micro_batch_size or micro))
    for flag, size, micro in batches:
        step = rules.batch_multiple(micro, data_parallel)
        count = size // step
        if not rules.fills_virtual_stages(count, group, pp):
            raise StartupError(
                f"{flag} {size} makes {count} microbatches on each pipeline, but virtual stages take {group} "
                f"at a time; use a multiple of {group * step}"
            )
