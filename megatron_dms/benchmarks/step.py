"""A training step of the retrofit against the same step without DMS, one process, one device.

Teacher's forward, student's forward, distillation and compression loss, backward and optimizer step, from the
parts that pretrain_dms.py runs. All candidates share one set of weights, gradients and optimizer state; they
differ in the student's attention. Weights are random, and the decisions are left to their noise: the borrowed
channels are zero, the offset gives the wanted compression ratio, and a learning rate of 0 keeps it.

On a machine without CUDA the CPU platform must be installed before this is imported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn.functional import silu

from megatron_dms.benchmarks.measuring import (
    Candidate,
    Result,
    compare,
    device_name,
    dtype_name,
    ratio,
)
from megatron_dms.config import DMSConfig
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.mcore.layer_specs import dense_block_spec, dms_block_spec
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.planning.models import ModelSize, preset
from megatron_dms.training.fused_output import FusedDistillation
from megatron_dms.training.teacher import distill, share_parameters
from megatron_dms.training.trainable import zero_borrowed_rows

SEED = 1234
NEVER = 30.0
"""Offset of the logits that stands for an infinite one: nothing is evicted."""
WITHOUT = SDPA, MEGATRON = "without DMS, SDPA", "without DMS, Megatron's"


SIZES = {
    "tiny": ModelSize("tiny", 2, 128, 256, 8, 2, 16, 1024, 131072, tied=True),
    "llama-3.2-1b": preset("llama-3.2-1b"),
}


@dataclass(frozen=True, kw_only=True)
class StepResult(Result):
    """Time of a whole training step. The peak counts bytes beyond weights, gradients and optimizer state."""

    model: str
    B: int
    T: int
    window: int
    attention: str
    """Attention of the student: a back-end of DMS; without DMS, Megatron's own attention, or SDPA with the
    back-end that torch chooses."""
    cr: float | None
    """Compression ratio of the decisions in the last step: pairs for each kept pair."""
    to_sdpa: float | None
    """Time divided by that of the step without DMS, with SDPA."""
    to_megatron: float | None
    """Time divided by that of the step without DMS, with Megatron's own attention."""


def measure(
    size: str,
    contexts: Sequence[int],
    batch: int,
    cr: float,
    window: int,
    backends: Sequence[str],
    fuse_output_layer: bool,
    dtype: torch.dtype,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[StepResult]:
    """Measure, at each context (in tokens), a step of `batch` samples with each back-end and without DMS.

    Args:
        fuse_output_layer: as in DMSConfig, for all candidates.

    Raises:
        ValueError: a number is out of range, or the size of the model is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"model is {size!r}, expected one of {', '.join(SIZES)}")
    if min(batch, repeats, cr, *contexts) < 1:
        raise ValueError(
            f"expected batch, CR, contexts and repeats >= 1, found {batch}, {cr:g}, {list(contexts)} and "
            f"{repeats}"
        )
    dms = DMSConfig(
        window=window,
        alpha_offset=offset_of(cr),
        temperature=1e-3,  # noise alone rarely decides as clearly as a trained predictor does
        final_cr=cr,
        fuse_output_layer=fuse_output_layer,
    )
    for name in backends:
        _with_backend(dms, name)  # refused before anything is built
    with _one_process(device):
        say(f"making {size} with random weights, {dtype} ...")
        config = _transformer_config(SIZES[size], dtype, device)
        candidates = specs(config, dms, backends)
        steps = _Steps(config, candidates, SIZES[size].vocab, max(contexts), dms, device)
        return [
            row for T in contexts for row in _rows(steps, size, batch, T, dms, dtype, repeats, device, say)
        ]


def offset_of(cr: float) -> float:
    """Return the alpha_offset at which logistic noise alone evicts 1 - 1/CR of the pairs."""
    return -math.log(cr - 1) if cr > 1 else NEVER


def specs(
    config: TransformerConfig, dms: DMSConfig, backends: Sequence[str]
) -> dict[str, TransformerBlockSubmodules]:
    """Return the layers of each candidate's student."""
    found = {name: dms_block_spec(config, dms=_with_backend(dms, name)) for name in backends}
    return found | {SDPA: dense_block_spec(config), MEGATRON: dense_block_spec(config, score_matrix=True)}


def _rows(
    steps: "_Steps",
    size: str,
    batch: int,
    T: int,
    dms: DMSConfig,
    dtype: torch.dtype,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Iterator[StepResult]:
    say(f"context {T}, batch {batch} ...")
    tokens = torch.randint(SIZES[size].vocab, (batch, T), device=device)
    found = compare(
        {name: Candidate(partial(steps.run, name, tokens)) for name in steps.models}, repeats, device
    )
    for name, own in found.items():
        yield StepResult(
            *astuple(own),
            device=device_name(device),
            dtype=dtype_name(dtype),
            model=size,
            B=batch,
            T=T,
            window=dms.window,
            attention=name,
            cr=None if own.ms is None else steps.achieved_cr(name),
            to_sdpa=ratio(own, found[SDPA]),
            to_megatron=ratio(own, found[MEGATRON]),
        )


class _Steps:
    """Students that share their weights, each with a teacher, and the training steps of each."""

    def __init__(
        self,
        config: TransformerConfig,
        specs: dict[str, TransformerBlockSubmodules],
        vocab_size: int,
        length: int,
        dms: DMSConfig,
        device: torch.device,
    ) -> None:
        self.config, self.dms, self.vocab_size = config, dms, vocab_size
        self.models: dict[str, torch.nn.Module] = {}
        self.accounts: dict[str, CompressionAccount] = {}
        self.ddp: DistributedDataParallel | None = None
        first: tuple[GPTModel, GPTModel] | None = None
        for name, spec in specs.items():
            pair = tuple(_gpt(config, s, vocab_size, length) for s in (spec, dense_block_spec(config)))
            for own, common in zip(pair, first or (), strict=first is not None):
                share_parameters(own, common)
            first = first or pair
            student, teacher = (model.to(device) for model in pair)
            zero_borrowed_rows(student, dms)
            model = distill(student, teacher, dms, vocab_size)
            model.train()  # modelopt's returns nothing
            if config.bf16:
                model = Float16Module(config, model)
            if self.ddp is None:  # its hooks are on the parameters, which all of them have in common
                model = self.ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
            self.models[name] = model
        settings = OptimizerConfig(
            lr=0.0, weight_decay=0.0, bf16=config.bf16, params_dtype=config.params_dtype, adam_beta2=0.95
        )
        self.optimizer = get_megatron_optimizer(settings, [self._ddp])

    @property
    def _ddp(self) -> DistributedDataParallel:
        """Megatron's wrapper of the common parameters."""
        if self.ddp is None:
            raise ValueError("there is no candidate to take steps with")
        return self.ddp

    def run(self, name: str, tokens: Tensor) -> None:
        """Take one training step of a student. tokens: [B, T]."""
        B, T = tokens.shape
        model, config = self.models[name], self.config
        account = CompressionAccount(
            ModelShape(config.num_layers, config.num_query_groups, config.num_layers, None),
            target=self.dms.schedule.target_fraction(math.inf),
            tokens=torch.full((B,), float(T), device=tokens.device),
            loss_weight=self.dms.compression_weight,
        )
        record: Microbatch | None = Microbatch(
            sample_ids=torch.arange(B, device=tokens.device),
            valid=torch.ones(B, T, dtype=torch.bool, device=tokens.device),
            phase=Phase.SOFT,
            seed=SEED,
            account=account,
        )
        self.accounts[name] = account
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        record = None if name in WITHOUT else record
        fused = {}
        if self.dms.fuse_output_layer:
            mask = torch.ones(B, T, device=tokens.device)
            fused["output_processor"] = FusedDistillation(self.dms, mask, self.vocab_size)
        out = model(tokens, positions, None, labels=tokens, packed_seq_params=record, **fused)
        loss = out if fused else unwrap_model(model).compute_kd_loss().sum()
        (loss / tokens.numel()).backward()
        self._ddp.finish_grad_sync()
        self.optimizer.step()

    def achieved_cr(self, name: str) -> float | None:
        """Return the compression ratio of the last step; None without DMS."""
        if name in WITHOUT:
            return None
        return 1 / (1 - self.accounts[name].mean_alpha(hard=True).mean().item())


def _with_backend(dms: DMSConfig, name: str) -> DMSConfig:
    return DMSConfig.from_dict({**dms.to_dict(), "attention_backend": name})


def _transformer_config(size: ModelSize, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    on_cuda = device.type == "cuda"
    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        num_query_groups=size.groups,
        kv_channels=size.head_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=on_cuda,
        masked_softmax_fusion=False,
        use_cpu_initialization=not on_cuda,
        transformer_impl="local",
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


def _gpt(config: TransformerConfig, spec: Any, vocab_size: int, length: int) -> GPTModel:
    return GPTModel(
        config,
        spec,
        vocab_size,
        length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=500000,
    )


@contextmanager
def _one_process(device: torch.device) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(SEED)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
