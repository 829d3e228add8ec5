"""Compare a Megatron checkpoint with an HF one: tensors bit for bit, then logits of the two models.

The logits come from two implementations, transformers' own model and Megatron's GPTModel, both in fp32 in
this process, so that a wrong name, a wrong order of heads, a wrong epsilon or wrong RoPE frequencies show
even where every tensor agrees with itself.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dms.checkpoint.errors import CheckpointError
from megatron_dms.checkpoint.families import read_model
from megatron_dms.checkpoint.hf_folder import HFFolder
from megatron_dms.checkpoint.megatron_folder import RELEASE, iteration_folder, open_checkpoint
from megatron_dms.checkpoint.rope import set_rope
from megatron_dms.checkpoint.source import MegatronTensors

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

LOGIT_TOLERANCE = 1e-4
"""Largest difference of fp32 logits that counts as equal."""
_PROMPTS = 4
_SEED = 1234


@dataclass(frozen=True)
class Verdict:
    """unequal: HF names whose bytes differ. The last two are None where logits were not compared (a DMS
    checkpoint).
    """

    tensors: int
    unequal: list[str]
    max_abs_logit_diff: float | None
    argmax_agreement: float | None

    @property
    def passed(self) -> bool:
        logits_equal = self.max_abs_logit_diff is None or self.max_abs_logit_diff <= LOGIT_TOLERANCE
        return not self.unequal and logits_equal


def verify(
    hf_dir: str | Path, megatron_dir: str | Path, iteration: int | None = None, prompt_tokens: int = 64
) -> Verdict:
    """Compare the two checkpoints. Raises CheckpointError if either cannot be read or their names do not
    match.

    Logits are compared for models without DMS; with it, the model needs the plug-in and is compared by its
    own tests.
    """
    _prepare_platform()
    hf, megatron = HFFolder(Path(hf_dir)), Path(megatron_dir)
    tensors, unequal = compare_tensors(hf, megatron, iteration)
    _, args = open_checkpoint(megatron, iteration)
    if getattr(args, "dms", None) is not None:
        return Verdict(tensors, unequal, None, None)
    diff, agreement = compare_logits(hf, megatron, iteration, prompt_tokens)
    return Verdict(tensors, unequal, diff, agreement)


def compare_tensors(hf: HFFolder, megatron_dir: Path, iteration: int | None) -> tuple[int, list[str]]:
    """Number of HF tensors, and the names of those whose type or bytes differ from the Megatron
    checkpoint's.
    """
    stored = MegatronTensors.open(megatron_dir, iteration, hf.path)
    names = dict.fromkeys([*hf.infos, *stored.places])
    if stored.model.tied and "lm_head.weight" in hf.infos:
        stored.places["lm_head.weight"] = stored.places["model.embed_tokens.weight"]
    known = (name for name in names if name in hf.infos and name in stored.places)
    # An import keeps every type; training may work in another one, and export casts back.
    imported = iteration_folder(megatron_dir, iteration).name == RELEASE

    def expected(name: str) -> Tensor:
        tensor = stored.read(name)
        return tensor if imported else tensor.to(hf.infos[name].dtype)

    equal = {name for name in known if _same_bytes(hf.read(name), expected(name))}
    return len(names), [name for name in names if name not in equal]


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )  # NaN equals itself


def compare_logits(
    hf: HFFolder, megatron_dir: Path, iteration: int | None, prompt_tokens: int
) -> tuple[float, float]:
    """Largest absolute difference of the logits, and the share of positions where the most likely token
    agrees.

    Prompts are random tokens, fixed by a seed: they reach every row of the vocabulary, which text would not.
    """
    from transformers import AutoModelForCausalLM

    model = read_model(hf.config)
    if not 0 < prompt_tokens <= model.positions:
        raise CheckpointError(
            f"--prompt-tokens is {prompt_tokens}, expected 1 to {model.positions} for this model"
        )
    generator = torch.Generator().manual_seed(_SEED)
    tokens_BT = torch.randint(model.vocab, (_PROMPTS, prompt_tokens), generator=generator)

    def theirs() -> Tensor:
        network = AutoModelForCausalLM.from_pretrained(
            hf.path, dtype=torch.float32, attn_implementation="eager"
        )
        return network.eval()(tokens_BT, use_cache=False).logits

    def ours() -> Tensor:
        _, args = open_checkpoint(megatron_dir, iteration)
        with _one_process():
            network = build_model(args).eval()
            load_weights(network, iteration_folder(megatron_dir, iteration))
            return megatron_logits(network, tokens_BT)

    reference, found = (_without_gradients(part) for part in (theirs, ours))
    found = found[..., : model.vocab]
    diff = (reference - found).abs().max().item()
    return diff, (reference.argmax(-1) == found.argmax(-1)).float().mean().item()


def build_model(args: Namespace) -> "GPTModel":
    """Megatron's GPTModel in fp32 with local layers, from a checkpoint's arguments; no DMS plug-in.

    Needs Megatron's parallel state; builds this rank's part of the model.
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
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=-(-args.vocab_size // tp) * tp,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
    )
    set_rope(model, args.rope_parameters)
    return model


def load_weights(model: "GPTModel", folder: Path) -> None:
    """Megatron's own loading of a torch_dist folder into a model, at whatever layout the processes have."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"]
    model.load_state_dict(state, strict=True)


def megatron_logits(model: "GPTModel", tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V / TP] of a GPTModel in one stage, causal."""
    batch, length = tokens_BT.shape
    positions = torch.arange(length, device=tokens_BT.device).expand(batch, -1)
    hidden = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).triu(1)  # True = not seen
    return model(tokens_BT, positions, hidden[None, None])


class _one_process:
    """A process group of one and Megatron's parallel state, for the block; what exists already is used and
    kept.
    """

    def __enter__(self) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        self._owned = not torch.distributed.is_initialized()
        if self._owned:
            self._folder = tempfile.TemporaryDirectory()
            store = f"file://{self._folder.name}/store"  # a file: no port to collide on
            torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(_SEED)

    def __exit__(self, *_: object) -> None:
        from megatron.core import parallel_state

        if self._owned:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
            self._folder.cleanup()


def _without_gradients(compute: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return compute()


def _prepare_platform() -> None:
    """Megatron asks for a CUDA device; where there is none, the CPU answers. Must come before megatron's
    import.
    """
    if not torch.cuda.is_available():
        from megatron_dms.platform import cpu

        cpu.install()
