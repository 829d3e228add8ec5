"""Give the arguments of a checkpoint to a run of Megatron.

`--use-checkpoint-args` copies a fixed list of names out of a checkpoint (`load_args_from_checkpoint`,
checked on megatron-core 0.19.2). Norm epsilon, query and key norms, the vocabulary and RoPE scaling are not
in the list, and the tokenizer is built before anybody could add them. So the checkpoint's values become the
parser's defaults instead (no `--use-checkpoint-args` then), and a flag that says otherwise is an error:

    def extra_args_provider(parser): ...; set_parser_defaults(parser, checkpoint, hf); return parser
    args = parse_and_validate_args(extra_args_provider)
    set_model_args(args, checkpoint); check_model_args(args, checkpoint)
    ... build the model ...; set_rope(model, args.rope_parameters)
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_dms.conversion.rope import attention_factor
from megatron_dms.errors import CheckpointError

ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups "
    "kv_channels position_embedding_type rotary_base rotary_percent rope_parameters normalization "
    "layernorm_epsilon qk_layernorm swiglu add_bias_linear add_qkv_bias vocab_size "
    "untie_embeddings_and_output_weights"
).split()
"""Names of the arguments on which a run, its checkpoint and its config.json must agree."""
_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}
"""The flags of Megatron that are named otherwise than their arguments."""
_BESIDES = (
    "max_position_embeddings attention_dropout hidden_dropout apply_layernorm_1p rotary_interleaved "
    "squared_relu use_rope_scaling rope_scaling_factor"
).split()
"""Further arguments that get the checkpoint's value; a run may change them, or `set_rope` overrules them."""


def differences(args: Namespace, expected: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    """Yield (name, found, expected) where `args` describe another model; unset arguments are not compared."""
    for name in ARCHITECTURE:
        found, wanted = getattr(args, name, None), expected.get(name)
        if name == "num_query_groups" and not expected.get("group_query_attention", True):
            continue  # Megatron leaves some number there that it does not use
        # a damaged file may hold anything, and only plain values compare as True
        if found is not None and wanted is not None and (found == wanted) is not True:
            yield name, found, wanted


def set_parser_defaults(parser: ArgumentParser, checkpoint: Namespace, tokenizer_folder: Path) -> None:
    """Make the checkpoint's model the default of Megatron's parser, in place; flags still win.

    checkpoint: of `checkpoint_args`. tokenizer_folder: of the HF files; its tokenizer is the default, where
    there is one.
    """
    stored = vars(checkpoint)
    names = (*ARCHITECTURE, *_BESIDES)
    parser.set_defaults(**{name: stored[name] for name in names if stored.get(name) is not None})
    if attention_factor(stored.get("rope_parameters") or {}) != 1.0:
        parser.set_defaults(apply_rope_fusion=False)  # the fused kernel has no such factor
    if (tokenizer_folder / "tokenizer_config.json").is_file():
        parser.set_defaults(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_folder))


def set_model_args(args: Namespace, checkpoint: Namespace) -> None:
    """Correct Megatron's parsed `args`, in place; call it before the model's config is made.

    The padded vocabulary is counted anew: Megatron pads what the tokenizer knows, but Qwen's models have rows
    beyond it, which would be lost. Raises CheckpointError for a checkpoint that this project did not import.
    """
    for name in ("rope_parameters", "vocab_size"):
        if getattr(checkpoint, name, None) is None:
            raise CheckpointError(f"the checkpoint has no {name}; make it with tools/convert.py import")
    args.rope_parameters = checkpoint.rope_parameters
    args.vocab_size = checkpoint.vocab_size
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple


def check_model_args(args: Namespace, checkpoint: Namespace) -> None:
    """Raise CheckpointError if flags describe another model than the checkpoint holds, naming the first
    difference.
    """
    for name, found, wanted in differences(args, vars(checkpoint)):
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        raise CheckpointError(
            f"{flag} is {found!r}, but the checkpoint has {wanted!r}; "
            "leave the flag out, it is set from the checkpoint"
        )
