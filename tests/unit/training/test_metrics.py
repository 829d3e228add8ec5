"""The figures that are logged, worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape
from megatron_dms.training.metrics import (
    COMPRESSION_LOSS,
    HARD_CR,
    SOFT_CR,
    TARGET_CR,
    LayerMeter,
    compression_reports,
    draw_kept_fraction,
    layer_extremes,
    schedule_text,
)


def account() -> CompressionAccount:
    """Return an account of two layers of one KV head, with two samples of 4 and 2 valid tokens."""
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    made = CompressionAccount(ModelShape(2, 1, 2, None), 0.75, valid.sum(dim=1).float(), 1.0)
    hard = torch.tensor([[[1.0, 1, 0, 0]], [[1, 0, 1, 1]]])  # the last two of sample 1 are padding
    made.report(0, torch.tensor([0]), hard * 0.9, hard, valid)
    made.report(1, torch.tensor([0]), hard * 0, hard * 0, valid)
    return made


def test_reports_are_ratios_of_sums() -> None:
    """3 of 12 decisions evict: CR = 12 / 9. Catches a mean of ratios, padding that counts, and soft and
    hard exchanged."""
    reports = compression_reports(account(), target_cr=4.0)
    values = {name: float(top / bottom) for name, (top, bottom) in reports.items()}
    assert values[HARD_CR] == pytest.approx(12 / 9)
    assert values[SOFT_CR] == pytest.approx(12 / (12 - 2.7))
    assert values[TARGET_CR] == pytest.approx(4.0)
    # Means are 2/8 and 1/4 against 3/4.
    assert values[COMPRESSION_LOSS] == pytest.approx((0.5 + 0.5) / 2)


def test_layer_meter_adds_microbatches_and_starts_anew() -> None:
    """Catches a meter that keeps the step before, or divides by samples instead of tokens."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        meter = LayerMeter()
        meter.add(account())
        meter.add(account())
        kept = meter.kept_fraction(dist.group.WORLD)
        assert torch.allclose(kept, torch.tensor([[1 - 6 / 12], [1.0]]))
        assert meter.kept_fraction(dist.group.WORLD) is None
    finally:
        dist.destroy_process_group()


def test_layer_extremes() -> None:
    """Catches least and most exchanged; a layer that keeps nothing must not divide by zero."""
    (least, low), (most, high) = layer_extremes(torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.0, 0.25]]))
    assert (least, most) == (1, 2) and low == pytest.approx(4 / 3) and high == pytest.approx(8)
    assert math.isfinite(layer_extremes(torch.zeros(1, 2))[1][1])


def test_schedule_text_counts_from_the_zeroing_phase() -> None:
    """Catches steps counted from the end of the zeroing phase, and a final ratio that is left out."""
    text = schedule_text(DMSConfig(zeroing_steps=20, steps_per_cr=10, final_cr=2.5))
    assert "CR 1 at step 20, CR 2 at step 30, CR 2.5 at step 35" in text


def test_heat_map_has_layers_down_and_heads_across(tmp_path: Path) -> None:
    """Catches a transposed picture."""
    path = tmp_path / "new" / "map.png"
    figure = draw_kept_fraction(torch.rand(3, 5), "a title", path)
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (3, 5) and figure.axes[0].get_ylabel() == "layer"
    assert path.read_bytes().startswith(b"\x89PNG")
