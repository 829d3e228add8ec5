"""The metrics: scalars for Megatron's loggers, and a picture of the kept fraction by layer and KV head.

A scalar is reported as a pair (numerator, denominator). Megatron adds up the pairs of all microbatches and
data-parallel ranks and divides once, so that every layout logs the number that one process would log.
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
"""The metrics that are 1 until something is evicted."""


def schedule_text(dms: DMSConfig) -> str:
    """Return a log line that says which training step reaches which compression ratio."""
    ratios = [*range(1, math.ceil(dms.final_cr)), dms.final_cr]
    steps = ", ".join(f"CR {cr:g} at step {dms.zeroing_steps + dms.schedule.step_of(cr)}" for cr in ratios)
    fading = f"borrowed channel fades out in steps 0 to {dms.zeroing_steps}; " if dms.zeroing_steps else ""
    return f" DMS schedule: {fading}{steps} (a checkpoint saved then is the model of that ratio)"


def optimizer_text(optimizer: Any) -> str:
    """Return a log line that names the optimizer: Transformer Engine's or Apex's fused one, or torch's.

    Args:
        optimizer: Megatron's optimizer, which wraps the one that steps, or several that Megatron chained.
    """
    inner = {type(part.optimizer) for part in getattr(optimizer, "chained_optimizers", [optimizer])}
    names = sorted(f"{kind.__module__.split('.')[0]}'s {kind.__name__}" for kind in inner)
    return f" optimizer: {', '.join(names)}"


def pair(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """Return a reported scalar, [2] fp32, on the numerator's device. Nothing waits for the device here."""
    numerator = numerator.detach().float()
    return torch.stack([numerator, torch.as_tensor(denominator, device=numerator.device).detach().float()])


def compression_reports(account: CompressionAccount, target_cr: float) -> dict[str, Tensor]:
    """Return the pairs of one microbatch: compression loss, target compression ratio, achieved ratios."""
    samples = len(account.tokens)
    entries = account.tokens * account.shape.layers * account.shape.groups  # [B], decisions of each sample
    hard, soft = account.mean_alpha(hard=True), account.mean_alpha(hard=False)
    return {
        COMPRESSION_LOSS: pair(samples * compression_loss(hard, account.target), samples),
        TARGET_CR: pair(torch.full_like(entries[0], samples * target_cr), samples),
        SOFT_CR: pair(entries.sum(), (entries * (1 - soft)).sum()),
        HARD_CR: pair(entries.sum(), (entries * (1 - hard)).sum()),
    }


class LayerMeter:
    """The evicted tokens per layer and KV head, over the microbatches and data-parallel ranks of a step."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None  # evicted [L, G], tokens []

    def add(self, account: CompressionAccount) -> None:
        """Add the decisions of one microbatch."""
        evicted, tokens = account.evicted_per_head(), account.tokens.sum()
        if self._sums is not None:
            evicted, tokens = self._sums[0] + evicted, self._sums[1] + tokens
        self._sums = (evicted, tokens)

    def kept_fraction(self, dp_group: dist.ProcessGroup) -> Tensor | None:
        """Return [L, G], the kept fraction of all that was added, or None if nothing was, and start anew.

        Every rank of `dp_group` calls this and gets the same.
        """
        if self._sums is None:
            return None
        evicted, tokens = self._sums
        totals = torch.cat([evicted.flatten(), tokens.reshape(1)])
        dist.all_reduce(totals, group=dp_group)
        self._sums = None
        return 1 - totals[:-1].view_as(evicted) / totals[-1]


def layer_extremes(kept: Tensor) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return (layer, CR) of the least and of the most compressed layer. kept: [L, G]."""
    by_layer = kept.mean(dim=1)
    smallest = torch.finfo(by_layer.dtype).tiny

    def with_ratio(layer: int) -> tuple[int, float]:
        return layer, 1 / max(float(by_layer[layer]), smallest)

    return with_ratio(int(by_layer.argmax())), with_ratio(int(by_layer.argmin()))


def draw_kept_fraction(kept: Tensor, title: str, path: Path) -> Any:
    """Draw a heat map of the kept fraction [L, G] (layers down, KV heads across), save it as a PNG file, and
    return the figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, groups = kept.shape
    figure = Figure(figsize=(max(4.0, 0.5 * groups + 2), max(3.0, 0.25 * layers + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kept.cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="KV head", ylabel="layer", title=title, xticks=range(groups))
    locator = axes.yaxis.get_major_locator()
    if isinstance(locator, MaxNLocator):  # matplotlib's default is one
        locator.set_params(integer=True)
    figure.colorbar(image, label="kept fraction of key-value pairs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return figure
