"""Mend how Megatron's distributed optimizer saves and loads, so that a resumed run equals one without a stop.

torch's AdamW, which takes the place of Transformer Engine's and Apex's, counts steps once per parameter, in
its state. Megatron saves one count for all, which is right, but its code has four faults:

- It takes the one count that it finds. It fails in an optimizer without state: before the first step, so in
  every resumed run, and on a rank whose share of the parameters is empty (such a rank can save with
  `--dist-ckpt-optim-fully-reshardable` only).
- Loading gives all parameters the same tensor as their count, which each of them then raises in place.
- Then loading overwrites this count with what it was before (`dp_reshardable`), or misses it in the
  checkpoint (`fully_reshardable`).
- Loading writes into weights that require a gradient, where the optimizer has no copies of them (fp32).

With every AdamW, a checkpoint of the sharding `dp_reshardable` has gaps between parameters, and their content
is whatever the memory held. So two checkpoints of equal runs would differ.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STEP = "step"


def mend() -> None:
    """Replace methods of Megatron's DistributedOptimizer."""
    _zero_gaps()
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _keep_steps()


def _zero_gaps() -> None:
    theirs = DistributedOptimizer.sharded_param_state_dp_reshardable

    def sharded_state(self: Any, *given: Any, **named: Any) -> dict[Any, Any]:
        state = theirs(self, *given, **named)
        for gap in _gaps(state):
            gap.zero_()
        return state

    DistributedOptimizer.sharded_param_state_dp_reshardable = sharded_state


def _gaps(state: dict[Any, Any]) -> Iterator[torch.Tensor]:
    buffers = [value for key, value in state.items() if isinstance(key, int)]
    for buckets in (buckets for buffer in buffers for buckets in buffer.values()):
        for part in (part for bucket in buckets for part in bucket if part["padding"].unwrap()):
            yield from (tensor.data for tensor in part.values() if isinstance(tensor, ShardedTensor))


def _keep_steps() -> None:
    their_state_dict = DistributedOptimizer.state_dict
    their_load = DistributedOptimizer.load_state_dict
    their_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> dict[str, Any]:
        state = self.optimizer.state
        if any(state.values()):
            return their_state_dict(self)
        state[_STEP] = {_STEP: torch.zeros(())}  # torch keeps a key that is no parameter as it is
        try:
            return their_state_dict(self)
        finally:
            del state[_STEP]

    @torch.no_grad()
    def load_state_dict(self: Any, saved: dict[str, Any]) -> None:
        their_load(self, saved)
        for state in self.optimizer.state.values():
            state[_STEP] = state[_STEP].clone()

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        their_set(self, model_param, {**tensors, _STEP: None})  # None: leave the count as it is

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
