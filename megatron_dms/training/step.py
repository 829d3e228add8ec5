"""The forward step that Megatron's training loop calls for each microbatch.

The normalisation is the same in every layout. The distillation loss is the sum of the KL over all target
tokens of the GLOBAL batch, divided by their number. The compression loss is the mean over all samples of the
global batch. To know the number of target tokens before the first backward pass, the step reads all its
microbatches at once.

Under context parallelism, every rank reads whole samples, cuts out its tokens, and adds up the losses of its
own tokens. The virtual pipeline stages of a rank work on the same microbatches, which are read once and have
one account each.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_wandb_writer,
    print_rank_0,
    print_rank_last,
)
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.kernels import backend_name
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.mcore.context_parallel import own_tokens
from megatron_dms.mcore.microbatch import Microbatch, Phase
from megatron_dms.resilience.watchdog import STEP, VALIDATION, Watchdog
from megatron_dms.training.fused_output import FusedDistillation
from megatron_dms.training.metrics import (
    COMPRESSION_LOSS,
    COMPRESSION_RATIOS,
    KL,
    LAYER_EXTREMES,
    LayerMeter,
    compression_reports,
    draw_kept_fraction,
    layer_extremes,
    optimizer_text,
    pair,
    schedule_text,
)
from megatron_dms.training.trainable import zero_borrowed_rows
from megatron_dms.upstream.megatron_optimizer import optimizer_of

_Queue = deque[tuple[dict[str, Tensor], Microbatch]]


class RetrofitStep:
    """Megatron's `forward_step_func`, with the schedule and the meters of the retrofit."""

    def __init__(self, dms: DMSConfig, watchdog: Watchdog) -> None:
        self.dms = dms
        self._watchdog = watchdog
        # attach() sets the next three.
        self._shape: ModelShape
        self._models: list[GPTModel] = []  # this rank's virtual pipeline stages, or its one stage
        self._queues: list[_Queue] = []  # the microbatches that each stage has yet to work on
        self._target_tokens: Tensor  # [], in the global batch under way; each training step sets it
        self._meter = LayerMeter()  # the decisions of the training step under way
        self._validation_meter = LayerMeter()
        self._finished: int | None = None  # training steps so far; None before the first one of this process

    def attach(self, models: list[GPTModel]) -> list[GPTModel]:
        """Count layers, create the process group of the accounts, and log the schedule. Megatron's model
        builder calls this hook.

        It is a collective operation. So it cannot wait for the first forward pass, in which the pipeline
        stages are not in step.
        """
        self._shape = _model_shape(models)
        self._models, self._queues = models, [deque() for _ in models]
        print_rank_0(schedule_text(self.dms))
        device = next(models[0].parameters()).device
        print_rank_0(f" DMS attention in training: {backend_name(self.dms.attention_backend, device)}")
        return models

    def __call__(self, data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run one microbatch. Return the output (for the next stage or the loss) and the loss function."""
        training = model.training
        self._watchdog.beat(STEP if training else VALIDATION, self._iteration(training) + 1)
        batch, microbatch = self._next(data_iterator, model)
        fused: dict[str, Any] = {}
        if training and self.dms.fuse_output_layer:
            fused["output_processor"] = FusedDistillation(self.dms, batch["loss_mask"], get_args().vocab_size)
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,  # the mask is causal, and DMS attention makes the rest
            labels=batch["labels"],
            packed_seq_params=microbatch,
            **fused,
        )
        return output, partial(self._loss, batch, microbatch, model)

    def _next(self, data_iterator: Iterator, model: torch.nn.Module) -> tuple[dict[str, Tensor], Microbatch]:
        """Return the next microbatch of this stage.

        The first virtual stage of a rank is the first to ask for a microbatch, and reads it for all stages.
        The data iterators of the other stages, which would give the same samples, are not used.
        """
        queue = self._queues[unwrap_model(model).vp_stage or 0]
        if not queue:
            config = get_model_config(model)
            if model.training:
                batches = self._start_step(data_iterator, config)
            else:
                batches = [_own_part(next(data_iterator))]
            records = [(batch, self._describe(batch, model.training, config)) for batch in batches]
            for each in self._queues:
                each.extend(records)
        return queue.popleft()

    def _start_step(self, data_iterator: Iterator, config: Any) -> list[dict[str, Tensor]]:
        batches = [_own_part(next(data_iterator)) for _ in range(get_num_microbatches())]
        tokens = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum()
        dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self._target_tokens = tokens.clamp(min=1)
        optimizer = optimizer_of(config)
        if self._finished is None:
            print_rank_0(optimizer_text(optimizer))
        self._finished = get_args().curr_iteration + 1
        if self.dms.zeroing_steps and get_args().curr_iteration == self.dms.zeroing_steps:
            for model in self._models:
                zero_borrowed_rows(model, self.dms)
            optimizer.reload_model_params()  # masters in higher precision must follow
        return batches

    def _iteration(self, training: bool) -> int:
        """Return the training step under way, from 0, or in evaluation the last finished one."""
        args = get_args()
        if training:
            return args.curr_iteration
        # Megatron sets curr_iteration only when it trains: not with --skip-train, and not in a finished run.
        return max((args.iteration if self._finished is None else self._finished) - 1, 0)

    def _describe(self, batch: dict[str, Tensor], training: bool, config: Any) -> Microbatch:
        """Return the record that travels to every layer."""
        valid = batch["valid"].bool()
        common = {"sample_ids": batch["sample_id"], "valid": valid, "seed": get_args().seed}
        iteration = self._iteration(training)
        if iteration < self.dms.zeroing_steps:
            return Microbatch(**common, phase=Phase.ZEROING, fade=self.dms.fade(iteration))
        scale = torch.ones((), device=valid.device)
        if training and config.grad_scale_func:
            scale = config.grad_scale_func(scale)
        account = CompressionAccount(
            shape=self._shape,
            target=self.dms.schedule.target_fraction(iteration - self.dms.zeroing_steps),
            tokens=valid.sum(dim=1).float().clamp(min=1),
            # Megatron averages gradients over context-parallel ranks as well, which hold parts of a sum.
            loss_weight=self.dms.compression_weight
            * scale
            * (parallel_state.get_context_parallel_world_size() / get_num_microbatches()),
        )
        return Microbatch(**common, phase=Phase.SOFT if training else Phase.HARD, account=account)

    def _loss(
        self, batch: dict[str, Tensor], microbatch: Microbatch, model: torch.nn.Module, output: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate and the reported pairs, on the last stage.

        Megatron 0.19.2 divides the loss by the number of microbatches, multiplies it by the number of
        context-parallel ranks, and averages gradients over the context-parallel and data-parallel ranks. The
        factor here turns all that into the sum over the global batch. The compression loss has its gradient
        already (mcore/compression_account.py), and is added for the report alone. The report is the mean over
        these ranks.
        """
        mask = batch["loss_mask"]
        training = model.training
        if training and self.dms.fuse_output_layer:
            kl_sum = output
        else:
            kl_sum = (unwrap_model(model).compute_kd_loss() * mask).sum()
        reports = {KL: pair(kl_sum, mask.sum())}
        if microbatch.account is None:
            one = torch.ones_like(kl_sum)
            reports |= dict.fromkeys(COMPRESSION_RATIOS, pair(one, 1)) | {COMPRESSION_LOSS: pair(0 * one, 1)}
        else:
            account = microbatch.account
            step = self._iteration(training) - self.dms.zeroing_steps
            reports |= compression_reports(account, self.dms.schedule.target_cr(step))
            (self._meter if training else self._validation_meter).add(account)
            if training:
                reports |= self._layer_reports()
        if not training:
            reports["LM loss"] = pair((output * mask).sum(), mask.sum())
            return kl_sum / mask.sum().clamp(min=1), reports
        parts = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        loss = kl_sum * parts / self._target_tokens
        compression = reports[COMPRESSION_LOSS]  # of this microbatch: all have equally many samples
        total = loss * parallel_state.get_context_parallel_world_size()
        total = total + self.dms.compression_weight * compression[0] / compression[1]
        return loss, {"loss": pair(total, 1)} | reports

    def _layer_reports(self) -> dict[str, Tensor]:
        """Return the pairs of the step's least and most compressed layer, which its last microbatch knows."""
        if self._queues[-1]:
            return {name: torch.zeros_like(self._target_tokens).expand(2) for name in LAYER_EXTREMES}
        kept = self._meter.kept_fraction(parallel_state.get_data_parallel_group())
        if kept is None:
            raise RuntimeError("no microbatch of this training step has reported its decisions")
        extremes = layer_extremes(kept)
        args = get_args()
        if (args.curr_iteration + 1) % args.log_interval == 0:
            (least, low), (most, high) = extremes
            print_rank_last(
                f" DMS iteration {args.curr_iteration + 1}: least compressed layer {least} (CR {low:.2f}), "
                f"most compressed layer {most} (CR {high:.2f})"
            )
        share = 1 / parallel_state.get_data_parallel_world_size()  # each rank reports the same number
        return {
            name: pair(torch.full_like(self._target_tokens, cr * share), share)
            for name, (_, cr) in zip(LAYER_EXTREMES, extremes, strict=True)
        }

    def after_validation(self, model: list[torch.nn.Module]) -> None:
        """Draw the heat map of the pairs kept in the validation just done. This is Megatron's
        `non_loss_data_func`."""
        if not parallel_state.is_pipeline_last_stage():
            return
        kept = self._validation_meter.kept_fraction(parallel_state.get_data_parallel_group())
        if kept is None or dist.get_rank() != dist.get_world_size() - 1:
            return
        args, step = get_args(), self._iteration(training=False) + 1
        path = Path(args.tensorboard_dir or args.save or ".") / "pictures" / f"kept_fraction_{step:07d}.png"
        figure = draw_kept_fraction(kept, f"iteration {step}", path)
        if writer := get_tensorboard_writer():
            writer.add_figure("kept fraction", figure, step)
        if wandb := get_wandb_writer():
            wandb.log({"kept fraction": wandb.Image(str(path))}, step)


def _model_shape(models: list[GPTModel]) -> ModelShape:
    """Return the counts of the model and of this rank, and create the process group of the accounts. All
    ranks call this together."""
    config = get_model_config(models[0])
    # The ranks that hold one copy of the model have the same data-parallel rank. Megatron's model-parallel
    # group leaves out context parallelism.
    own = parallel_state.get_data_parallel_rank()
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    copies = [[rank for rank, copy in enumerate(everyone) if copy == each] for each in sorted(set(everyone))]
    ranks = None
    if len(copies[own]) > 1:
        found, _ = dist.new_subgroups_by_enumeration(copies, backend="gloo")
        ranks = cast(dist.ProcessGroup, found)  # typed for ranks in none of the subgroups, too
    layers = sum(len(model.decoder.layers) for model in models)
    return ModelShape(config.num_layers, config.num_query_groups, layers, ranks)


def _own_part(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch on the device, with the tokens of this context-parallel rank."""
    on_device = {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}
    return own_tokens(on_device, parallel_state.get_context_parallel_group())
