"""Merging (DMC) in the plug-in's attention, with the model and the reference of test_attention.py."""

import pytest

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.microbatch import Phase
from megatron_dms.training.trainable import zero_borrowed_rows
from tests.support.mcore_cases import (
    LAYERS,
    ROWS,
    build,
    changed_rows,
    check_attention_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_process")

MERGE = {
    **{"method": "merge", "predictor": "key_channel", "window": 0, "importance_scale": 1.5},
    **{"importance_offset": 0.2, "alpha_scale": 2.0, "alpha_offset": 0.3, "temperature": 0.5},
}


@pytest.mark.parametrize(("phase", "fade"), [(Phase.HARD, 0.0), (Phase.SOFT, 0.0), (Phase.ZEROING, 0.6)])
def test_merging_and_gradients(phase: Phase, fade: float) -> None:
    """Compares DMC with the reference. Catches: the importance read after RoPE, of another head or
    channel, or of the faded query; its scale and offset mixed up; decision and importance exchanged;
    merging before RoPE; merging while the channels fade; decisions or importances without a gradient."""
    check_attention_and_gradients(DMSConfig(**MERGE), phase, fade)


def test_merging_zeroes_the_rows_of_both_channels() -> None:
    """Catches: the importance's rows left as they are, so that the query loses a channel it still uses."""
    dms = DMSConfig(**MERGE)
    model = build(dms)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero_borrowed_rows(model, dms)
    rows = sorted(ROWS["query_channel"] + ROWS["key_channel"])
    assert set(map(tuple, changed_rows(model, before).values())) == {tuple(rows)}
    assert len(changed_rows(model, before)) == 2 * LAYERS  # weight and bias
