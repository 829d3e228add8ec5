"""Megatron's model of a Megatron checkpoint, in fp32, on the ranks that this process is one of.

Layers, names, shapes and the order of heads come from megatron-core, weights by its own
dist_checkpointing.load, eviction from the DMS plug-in. Nothing here goes through Megatron's command line, so
that an error in how training sets up its model shows as a difference.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from megatron_dms.conversion.hf_weights import sharded_tensors
from megatron_dms.conversion.parity.prompts import Prompts
from megatron_dms.conversion.rope import set_rope

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megatron_dms.mcore.compression_account import CompressionAccount
    from megatron_dms.mcore.microbatch import Microbatch

_SEED = 1234
"""Of the decision noise, which hard decisions do not have."""


def build_model(args: Namespace, virtual_stage: int | None = None) -> "GPTModel":
    """Build this rank's part of Megatron's GPTModel in fp32, from a checkpoint's arguments: local layers,
    with the DMS plug-in where the checkpoint has DMS. virtual_stage: which of its chunks, under virtual
    pipelining.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.layernorm_epsilon,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
    )
    place = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    if getattr(args, "dms", None) is not None:
        from megatron_dms.config import DMSConfig
        from megatron_dms.mcore.layer_specs import dms_block_spec

        spec = dms_block_spec(config, dms=DMSConfig.from_dict(args.dms))
    model = GPTModel(
        config,
        spec,
        vocab_size=-(-args.vocab_size // tp) * tp,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        vp_stage=virtual_stage,
    )
    set_rope(model, args.rope_parameters)
    return model


def load_weights(model: "GPTModel", folder: Path) -> None:
    """Megatron's own loading of a torch_dist folder into a model, at whatever layout the processes have."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"]
    model.load_state_dict(state, strict=True)


@torch.no_grad()
def round_weights(model: "GPTModel", dtypes: Mapping[str, torch.dtype]) -> None:
    """Round the values of a model, in place, to the types that their keys in a checkpoint have here."""
    for leaf in sharded_tensors(model.sharded_state_dict().values()):
        if leaf.key in dtypes:
            leaf.data.copy_(leaf.data.to(dtypes[leaf.key]))


def run_model(network: "GPTModel", prompts: Prompts) -> dict[str, object]:
    """This rank's part of a forward: the logits of the whole vocabulary in the last stage (None before it),
    and the decisions of its layers and KV heads, if any.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    length = len(prompts.positions)
    hidden_TT = torch.ones(length, length, dtype=torch.bool).triu(1)  # True = not seen
    decisions = _Decisions()
    rope = network.rotary_pos_emb
    network.rotary_pos_emb = _RowsOfPositions(rope, prompts.positions)
    call = partial(network, prompts.tokens_BT(), prompts.positions_BT(), hidden_TT[None, None])
    if hasattr(network.decoder.layers[0].self_attention, "dms"):
        call = partial(call, packed_seq_params=decisions.microbatch(prompts))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if stage > 0:  # with one process to a stage, the stage is the rank
        received = torch.empty(length, prompts.count, network.config.hidden_size)
        torch.distributed.recv(received, stage - 1)
        network.set_input_tensor(received)
    out = call()
    network.rotary_pos_emb = rope
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(out.contiguous(), stage + 1)
        return {"logits": None, "decisions": decisions.by_layer}
    logits = gather_from_tensor_model_parallel_region(out)
    return {"logits": logits, "decisions": decisions.by_layer}


class _RowsOfPositions(nn.Module):
    """Stands in for a model's rotary embedding and gives it the angles of the prompts' positions, which
    Megatron always counts from 0.
    """

    def __init__(self, rope: nn.Module, positions: Sequence[int]) -> None:
        super().__init__()
        self.rope = rope
        self.positions = positions
        self.get_rotary_seq_len = rope.get_rotary_seq_len

    def forward(self, max_seq_len: int, **kwargs: object) -> Tensor:
        if max_seq_len != len(self.positions):
            raise ValueError(f"{max_seq_len} rows asked of a table for {len(self.positions)} positions")
        return torch.cat([self.rope(1, offset=position, **kwargs) for position in self.positions])


@dataclass
class _Decisions:
    """The decisions that DMS layers report. It stands in for the compression account of training."""

    by_layer: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> global numbers of the KV heads [G], bool decisions [B, G, T]."""

    def report(self, layer: int, heads: Tensor, alpha: Tensor, hard: Tensor, valid: Tensor) -> None:
        self.by_layer[layer] = (heads, hard.bool())

    def microbatch(self, prompts: Prompts) -> "Microbatch":
        """Return a record that asks for hard decisions and has this object as its account."""
        from megatron_dms.mcore.microbatch import Microbatch, Phase

        return Microbatch(
            sample_ids=torch.arange(prompts.count),
            valid=torch.ones(prompts.count, len(prompts.positions), dtype=torch.bool),
            phase=Phase.HARD,
            seed=_SEED,
            account=cast("CompressionAccount", self),  # hard decisions are only reported
        )
