"""What is logged: scalars for Megatron's own loggers, and the picture of who keeps what.

A scalar is reported as a pair (numerator, denominator): Megatron adds the pairs up over microbatches and
data-parallel ranks and divides once, so that every layout logs the number of one process.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.compression_account import CompressionAccount
from megatron_dms.ops.losses import compression_loss

KL, COMPRESSION_LOSS = "KL", "compression loss"
TARGET_CR, SOFT_CR, HARD_CR = "target CR", "achieved CR (soft)", "achieved CR (hard)"
LAYER_EXTREMES = ("CR of the least compressed layer", "CR of the most compressed layer")
COMPRESSION_RATIOS = (TARGET_CR, SOFT_CR, HARD_CR, *LAYER_EXTREMES)
"""What is 1 until something is evicted."""


def schedule_text(dms: DMSConfig) -> str:
    """Which training step reaches which compression ratio, for the log."""
    ratios = [*range(1, math.ceil(dms.final_cr)), dms.final_cr]
    steps = ", ".join(f"CR {cr:g} at step {dms.zeroing_steps + dms.schedule.step_of(cr)}" for cr in ratios)
    fading = f"borrowed channel fades out in steps 0 to {dms.zeroing_steps}; " if dms.zeroing_steps else ""
    return f" DMS schedule: {fading}{steps} (a checkpoint saved then is the model of that ratio)"


def optimizer_text(optimizer: Any) -> str:
    """Whose optimizer steps, for the log: Transformer Engine's or Apex's fused one, or torch's.

    Args:
        optimizer: Megatron's, around it; for several groups of parameters, several chained.
    """
    inner = {type(part.optimizer) for part in getattr(optimizer, "chained_optimizers", [optimizer])}
    names = sorted(f"{kind.__module__.split('.')[0]}'s {kind.__name__}" for kind in inner)
    return f" optimizer: {', '.join(names)}"


def pair(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """A reported scalar, [2] fp32 on the numerator's device: nothing waits for the device here."""
    numerator = numerator.detach().float()
    return torch.stack([numerator, torch.as_tensor(denominator, device=numerator.device).detach().float()])


def compression_reports(account: CompressionAccount, target_cr: float) -> dict[str, Tensor]:
    """The pairs of one microbatch: loss, target and achieved compression ratio, soft and hard."""
    samples = len(account.tokens)
    entries = account.tokens * account.shape.layers * account.shape.groups  # [B] decisions of each sample
    hard, soft = account.mean_alpha(hard=True), account.mean_alpha(hard=False)
    return {
        COMPRESSION_LOSS: pair(samples * compression_loss(hard, account.target), samples),
        TARGET_CR: pair(torch.full_like(entries[0], samples * target_cr), samples),
        SOFT_CR: pair(entries.sum(), (entries * (1 - soft)).sum()),
        HARD_CR: pair(entries.sum(), (entries * (1 - hard)).sum()),
    }


class LayerMeter:
    """Evicted tokens per layer and KV head, over the microbatches and data-parallel ranks of a step."""

    def __init__(self) -> None:
        self._evicted: Tensor | float = 0.0
        self._tokens: Tensor | float = 0.0

    def add(self, account: CompressionAccount) -> None:
        """Add one microbatch."""
        self._evicted = self._evicted + account.evicted_per_head()
        self._tokens = self._tokens + account.tokens.sum()

    def kept_fraction(self, dp_group: dist.ProcessGroup) -> Tensor | None:
        """[L, G] kept fraction of all that was added, the same on every rank; starts anew. None if empty."""
        if not isinstance(self._evicted, Tensor):
            return None
        totals = torch.cat([self._evicted.flatten(), self._tokens.reshape(1)])
        dist.all_reduce(totals, group=dp_group)
        kept = 1 - totals[:-1].view_as(self._evicted) / totals[-1]
        self._evicted = self._tokens = 0.0
        return kept


def layer_extremes(kept: Tensor) -> tuple[tuple[int, float], tuple[int, float]]:
    """(layer, CR) of the least and of the most compressed layer. kept: [L, G]."""
    by_layer = kept.mean(dim=1)
    least, most = int(by_layer.argmax()), int(by_layer.argmin())
    smallest = torch.finfo(by_layer.dtype).tiny
    return tuple((layer, 1 / max(float(by_layer[layer]), smallest)) for layer in (least, most))


def draw_kept_fraction(kept: Tensor, title: str, path: Path) -> Any:
    """Heat map of the kept fraction [L, G], layers down, KV heads across; saved as PNG -> the figure."""
    from matplotlib.figure import Figure

    layers, groups = kept.shape
    figure = Figure(figsize=(max(4.0, 0.5 * groups + 2), max(3.0, 0.25 * layers + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kept.cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="KV head", ylabel="layer", title=title, xticks=range(groups))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="kept fraction of key-value pairs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return figure
