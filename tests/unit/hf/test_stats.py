"""Reads and peaks of each layer and head, against counting pairs by the definition."""

import pytest
import torch

from tests.support.dms_by_definition import held_pairs, reference
from tests.support.generation_by_hand import left_padded
from tests.support.tiny_dms_models import KV_HEADS, LAYERS, random_tokens, tiny_model

PROMPTS, NEW = (13, 6, 9), 17


def unequal_model(**settings):
    """Return a model whose head 0 evicts nearly everything and whose head 1 hardly anything.

    The difference is smaller in later layers.
    """
    model = tiny_model("qwen2", predictor="linear", **settings)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            projection = layer.self_attn.dms_proj_alpha
            projection.bias.copy_(torch.tensor([4.0, -4.0]) / (i + 1))
    return model


def held_by_hand(model, ids_T, lengths):
    """Count the pairs of one sequence after each of these lengths: [produced, layers, heads]."""
    window, lag = model.dms_settings.window, model.dms_settings.lag
    decision = reference(model, ids_T).decision.tolist()
    return torch.tensor(
        [[[held_pairs(head, n, window, lag) for head in layer] for layer in decision] for n in lengths]
    ).double()


@pytest.mark.parametrize(("window", "lag"), [(3, 0), (3, 1), (7, 3)])
@pytest.mark.parametrize("chunk", [4, 12])
@torch.no_grad()
def test_reads_and_peaks_of_each_head(window, lag, chunk):
    """Catches heads or layers exchanged, a sum where a mean over sequences belongs, sequences that count on
    after their end, padding that counts, and a peak that is not the head's own."""
    model = unequal_model(window=window, lag=lag)
    prompts = [random_tokens(1, length, seed=i) for i, length in enumerate(PROMPTS)]
    inputs = left_padded(*prompts) | {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    new = model.generate(**inputs)[1, PROMPTS[0] :].tolist()
    eos = next(new[i] for i in range(4, NEW) if new[i] not in new[:i])  # ends the second sequence early
    cache = model.make_cache()
    for start in range(0, PROMPTS[0] - 1, chunk):
        mask_BT = inputs["attention_mask"][:, : start + chunk]
        # Not by prefill_chunk_size: transformers 4.57 counts its positions in columns, padding included.
        position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
        ids_BT = inputs["input_ids"][:, start : start + chunk]
        model(ids_BT, attention_mask=mask_BT, position_ids=position_BT, past_key_values=cache)
    out_BT = model.generate(**inputs, eos_token_id=eos, past_key_values=cache)
    stats = model.last_kv_stats
    print(f"generated {stats.generated_tokens}")
    reads, peaks = [], []
    for b, length in enumerate(PROMPTS):
        new = out_BT[b, PROMPTS[0] :].tolist()
        produced = new.index(eos) + 1 if eos in new else NEW
        assert stats.generated_tokens[b] == produced
        ids_T = torch.cat([prompts[b][0], torch.tensor(new[: produced - 1], dtype=torch.int64)])
        held_CLG = held_by_hand(model, ids_T, range(length, length + produced))
        reads.append(held_CLG.sum(dim=0))
        peaks.append(held_CLG.amax(dim=0))
        assert stats.kv_reads[b] == pytest.approx(reads[-1].mean().item())
        assert stats.peak_tokens[b] == pytest.approx(held_CLG.mean(dim=(1, 2)).max().item())
    assert len(set(stats.generated_tokens)) > 1
    for found, expected in ((stats.kv_reads_per_head, reads), (stats.peak_tokens_per_head, peaks)):
        expected_LG = torch.stack(expected).mean(dim=0)
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected_LG, rtol=1e-12)
        assert (expected_LG[:, 1] > 1.2 * expected_LG[:, 0]).all(), "heads are to differ"
        assert len(expected_LG.unique(dim=0)) == LAYERS, "the layers, too"
    assert stats.kv_reads_mean == pytest.approx(torch.tensor(stats.kv_reads_per_head).mean().item())
    assert stats.peak_tokens_mean == pytest.approx(torch.tensor(stats.peak_tokens_per_head).mean().item())


@torch.no_grad()
def test_counts_follow_reordered_sequences():
    """Catches tables left behind by a beam search: each row is to have the past of the one it came from."""
    model, ids_BT = unequal_model(), random_tokens(2, 12)
    cache = model.make_cache()
    model(ids_BT, past_key_values=cache)
    cache.meter.count_generated(None)
    before = cache.meter.stats()
    cache.reorder_cache(torch.tensor([1, 1]))
    alone = model.make_cache()
    model(ids_BT[1:], past_key_values=alone)
    alone.meter.count_generated(None)
    for name in ("kv_reads_per_head", "peak_tokens_per_head"):
        assert (
            getattr(cache.meter.stats(), name) == getattr(alone.meter.stats(), name) != getattr(before, name)
        )


@torch.no_grad()
def test_tables_come_on_request():
    """Catches an L x G table in what is logged for every batch, or lost where it was asked for."""
    model = unequal_model()
    model.generate(random_tokens(1, 9), max_new_tokens=3, do_sample=False)
    stats = model.last_kv_stats
    tables = {"evicted_fraction_per_head", "kv_reads_per_head", "peak_tokens_per_head"}
    assert stats.to_dict(per_head=True).keys() - stats.to_dict().keys() == tables
    for name in tables:
        assert [len(row) for row in stats.to_dict(per_head=True)[name]] == [KV_HEADS] * LAYERS
