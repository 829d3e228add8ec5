"""What a run must fulfil before it starts: flags, checkpoint and teacher are checked against each other.

Every check raises StartupError with one line that says what was found, what was expected, and the fix. No
check changes anything.
"""

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_dms.config import DMSConfig
from megatron_dms.errors import StartupError

if TYPE_CHECKING:
    from megatron_dms.training.weights import Weights

_ANOTHER_MODEL = "it would be another model than the checkpoint's"
_VERIFIED_SAVES = (
    "every checkpoint is verified before it counts and before it is loaded; see docs/survival.md"
)
_UNEVEN = "stages must hold equally many layers"
_EIGHT_BITS = "nobody has measured what so coarse a rounding does to eviction decisions; use --bf16"

# Megatron's settings that DMS attention does not read, or that would change the checkpoint's model. Accepting
# another value would be silently wrong. Name -> (the value it must have, the reason).
_UNSUPPORTED = {
    "cp_comm_type": (["a2a"], "ranks exchange heads for tokens by an all-to-all, in every layer"),
    "hierarchical_context_parallel_sizes": (None, "ranks exchange heads for tokens by one all-to-all"),
    "num_experts": (None, "mixture-of-experts models are not supported"),
    "multi_latent_attention": (False, "multi-latent attention is not supported"),
    "attention_dropout": (0.0, "distillation compares logits, and dropout only adds noise to them"),
    "hidden_dropout": (0.0, "distillation compares logits, and dropout only adds noise to them"),
    "mtp_num_layers": (None, "multi-token prediction is not supported"),
    "calculate_per_token_loss": (
        False,
        "the forward step normalises by the tokens of the global batch itself",
    ),
    "rerun_mode": ("disabled", "the forward step reads a whole step's microbatches at once"),
    "use_torch_fsdp2": (False, "it wraps the model in another way"),
    "use_megatron_fsdp": (False, "it wraps the model in another way"),
    "window_size": (None, "DMS attention has a window of its own, --dms-window"),
    "yaml_cfg": (None, "flags and the checkpoint say what the model is"),
    "use_checkpoint_args": (False, "the architecture always comes from the checkpoint"),
    "rotary_interleaved": (False, _ANOTHER_MODEL),
    "apply_layernorm_1p": (False, _ANOTHER_MODEL),
    "attention_output_gate": (False, _ANOTHER_MODEL),
    "qk_l2_norm": (False, _ANOTHER_MODEL),
    "use_mup": (False, _ANOTHER_MODEL),
    "apply_query_key_layer_scaling": (False, _ANOTHER_MODEL),
    "no_rope_freq": (None, _ANOTHER_MODEL),
    "activation_func_clamp_value": (None, _ANOTHER_MODEL),
    "glu_linear_offset": (0.0, _ANOTHER_MODEL),
    "experimental_attention_variant": (None, _ANOTHER_MODEL),
    "hybrid_layer_pattern": (None, _ANOTHER_MODEL),
    "heterogeneous_layers_config_path": (None, _ANOTHER_MODEL),
    "softmax_type": ("vanilla", "DMS attention has the plain softmax"),
    "qk_clip": (False, "it would change the borrowed channel's weights"),
    "decoder_first_pipeline_num_layers": (None, _UNEVEN),
    "decoder_last_pipeline_num_layers": (None, _UNEVEN),
    "pipeline_model_parallel_layout": (None, _UNEVEN),
    "save_retain_interval": (
        None,
        "old checkpoints are removed by --dms-keep-checkpoints, once the new one is verified",
    ),
    "non_persistent_save_interval": (None, "such checkpoints are not verified"),
    "non_persistent_ckpt_type": (None, "such checkpoints are not verified"),
    "ckpt_format": ("torch_dist", _VERIFIED_SAVES),
    "ckpt_convert_format": (None, _VERIFIED_SAVES),
    "verify_integrity": (False, f"rank 0 alone would read everything once more: {_VERIFIED_SAVES}"),
    "async_strategy": ("mcore", "it is the only strategy whose saves are verified"),
    "use_persistent_ckpt_worker": (False, "a save would wait for ever if such a worker died"),
    "spec": (None, "megatron_dms.mcore.layer_specs builds the layers"),
    "fp8": (None, _EIGHT_BITS),
    "fp4": (None, _EIGHT_BITS),
}

_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}  # flags that are not named like their setting


def check_supported(args: Namespace) -> None:
    """Check that no flag is set which DMS would silently ignore."""
    for name, (expected, reason) in _UNSUPPORTED.items():
        found = getattr(args, name, expected)
        if found != expected:
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise StartupError(f"{flag} is {found}, expected {expected} with DMS: {reason}")


def check_positive(args: Namespace) -> None:
    """Check the sizes by which later checks divide."""
    for name in (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
        "seq_length",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise StartupError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")


def check_sequence_length(args: Namespace) -> None:
    """Check that the model has a position for each token of a sequence."""
    if args.seq_length is None or args.seq_length > args.max_position_embeddings:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but the model has {args.max_position_embeddings} positions "
            "(max_position_embeddings); use a shorter --seq-length"
        )


def check_stored_settings(dms: DMSConfig, start: "Weights", continues: bool) -> None:
    """Check that the DMS settings agree with the settings of the checkpoint."""
    stored = getattr(start.args, "dms", None)
    if stored:
        try:
            dms.check_against(stored, resuming=continues)
        except ValueError as error:
            raise StartupError(f"{error} ({start.folder})") from error
    elif continues:
        raise StartupError(
            f"{start.folder} was trained without DMS; add --finetune to start a retrofit from it"
        )


def check_start(dms: DMSConfig, start: "Weights") -> None:
    """Check that a new retrofit does not start with a half-faded borrowed channel."""
    if not dms.borrows_channel or dms.zeroing_steps:
        return
    zeroing = (getattr(start.args, "dms", None) or {}).get("zeroing_steps", 0)
    if zeroing and start.iteration <= zeroing:
        raise StartupError(
            f"{start.folder} was saved at step {start.iteration}, within its zeroing phase of {zeroing} "
            f"steps; start from a later one, or use --dms-zeroing-steps {zeroing}"
        )


def warn_if_not_zeroed(dms: DMSConfig, start: "Weights") -> None:
    """Warn if a channel that a base model still uses is about to be cut out of attention."""
    if dms.borrows_channel and not dms.zeroing_steps and not getattr(start.args, "dms", None):
        print(
            f"warning: {start.folder} was never retrofitted and --dms-zeroing-steps is 0: the "
            f"{dms.predictor} is cut out of attention at once and evicts at random until it has learned: "
            "expect a loss spike",
            file=sys.stderr,
        )


def check_attention_backend(args: Namespace, dms: DMSConfig) -> None:
    """Check that the named back-end can train on this machine (Triton's interpreter counts: tests use it)."""
    from megatron_dms.upstream import cpu

    name = dms.attention_backend
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if cpu.installed() and name in ("flex", "triton") and not interpreted:
        raise StartupError(
            f"--dms-attention-backend {name} needs CUDA to train, and there is none here; use auto, dense or "
            "flash"
        )
    if not cpu.installed() and name == "flash" and not (args.bf16 or args.fp16):
        raise StartupError(
            "--dms-attention-backend flash in fp32: on CUDA it takes bf16 and fp16; add --bf16, or use triton"
        )


def check_training(args: Namespace, dms: DMSConfig) -> None:
    """Check the settings under which frozen weights would change, zeroed weights would not stay zero, or
    nothing would be saved."""
    if dms.zeroing_steps and args.use_precision_aware_optimizer:
        raise StartupError(
            "--use-precision-aware-optimizer with --dms-zeroing-steps: the optimizer's master weights cannot "
            "be zeroed; drop it"
        )
    if args.save and not args.save_interval:
        raise StartupError("--save without --save-interval; add --save-interval STEPS")
    if dms.train == "predictor" and dms.borrows_channel:
        decay = max(args.weight_decay, args.start_weight_decay or 0, args.end_weight_decay or 0)
        if decay:
            raise StartupError(
                f"--weight-decay is {decay}, expected 0 with --dms-train predictor and a "
                "borrowed channel: decay would change the frozen rows of the QKV weight; add --weight-decay 0"
            )


def open_teacher(args: Namespace, dms: DMSConfig) -> "Weights | None":
    """Open the teacher's weights, and check that they are dense, of the same vocabulary, and fit the sequence
    length.

    Returns:
        The teacher's weights; None if the teacher is the student itself.

    Raises:
        StartupError, CheckpointError: no teacher is named, or it cannot be used.
    """
    from megatron_dms.training.weights import open_weights

    if dms.teacher is None:
        raise StartupError(
            "no teacher: give --dms-teacher DIR (a HF folder or a Megatron checkpoint; usually the model you "
            "start from), or --dms-teacher self with --dms-predictor linear --dms-train predictor"
        )
    if dms.teacher == "self":
        return None
    weights = open_weights(dms.teacher)
    teacher = weights.args
    if teacher.vocab_size != args.vocab_size:
        raise StartupError(
            f"the teacher {dms.teacher} has a vocabulary of {teacher.vocab_size}, the student has "
            f"{args.vocab_size}; distillation needs a teacher of the same tokenizer"
        )
    if getattr(teacher, "dms", None):
        raise StartupError(
            f"the teacher {dms.teacher} is a DMS model, expected a dense one; use its base model"
        )
    if args.seq_length > teacher.max_position_embeddings:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but the teacher has {teacher.max_position_embeddings} "
            "positions; use a shorter --seq-length"
        )
    return weights
