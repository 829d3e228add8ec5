"""generate() gives the tokens of the masked forward, and statistics that match counting by hand."""

import json

import pytest
import torch
from transformers import StoppingCriteria

from megatron_dms.hf import MODEL_CLASSES
from megatron_dms.hf.pages_dms import PAGE_SIZE
from tests.support.dms_by_definition import held_pairs, reference
from tests.support.generation_by_hand import NEW, PROMPT, greedy_by_hand, left_padded
from tests.support.tiny_dms_models import HEAD_SIZE, KV_HEADS, LAYERS, random_tokens, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": NEW}


def cost_by_hand(model, ids_T, prompt, produced):
    """Count the cost of one sequence by definition.

    Returns the reads, the peak, the decisions to evict per [layer, head], and the number of decided
    tokens.
    """
    window, lag = model.dms_settings.window, model.dms_settings.lag
    seen = prompt + produced - 1
    decision = reference(model, ids_T[:seen]).decision
    held = [
        [held_pairs(head, tokens, window, lag) for layer in decision.tolist() for head in layer]
        for tokens in range(prompt, seen + 1)
    ]
    held = torch.tensor(held).double().mean(dim=1)  # [produced]
    return held.sum().item(), held.max().item(), decision[:, :, lag:].sum(dim=2), seen - lag


@pytest.mark.parametrize("family", MODEL_CLASSES)
@pytest.mark.parametrize("predictor", ["query_channel", "linear", "key_channel"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_masked_forward(family, predictor):
    """Catches generate() with a cache of its own, wrong position ids, or a prompt split wrongly."""
    model, ids_BT = tiny_model(family, predictor=predictor), random_tokens(2, PROMPT)
    expected = greedy_by_hand(model, ids_BT)
    assert torch.equal(model.generate(ids_BT, **GREEDY), expected)
    assert model.last_kv_stats.achieved_cr > 1.5, "nothing much was evicted: a dense cache would pass, too"
    assert torch.equal(model.generate(ids_BT, prefill_chunk_size=5, **GREEDY), expected)
    assert model.last_kv_stats.generated_tokens == [NEW, NEW]
    assert torch.equal(model.generate(ids_BT, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("lag", [0, 1, 3])
@torch.no_grad()
def test_padded_batch_and_statistics(lag):
    """Catches padding or ended sequences in any figure, a query's reads counted one step early or late, the
    mean taken over slots instead of pairs, and peaks of the batch instead of the sequence."""
    model = tiny_model(lag=lag)
    prompts = [random_tokens(1, PROMPT), random_tokens(1, 6, seed=3), random_tokens(1, 9, seed=4)]
    alone = [greedy_by_hand(model, p)[0] for p in prompts]
    # The token that the second sequence produces first at its 5th step or later becomes the end of sequence.
    new = alone[1][6:].tolist()
    step = next(i for i in range(4, NEW) if new[i] not in new[:i])
    eos = new[step]
    out = model.generate(**left_padded(*prompts), eos_token_id=eos, pad_token_id=0, **GREEDY)
    stats = model.last_kv_stats

    evicted, decided = torch.zeros(LAYERS, KV_HEADS), 0
    for i, (prompt, expected) in enumerate(zip(prompts, alone, strict=True)):
        length = prompt.shape[1]
        new = expected[length:].tolist()
        produced = new.index(eos) + 1 if eos in new else NEW
        assert out[i, PROMPT : PROMPT + produced].tolist() == new[:produced]
        reads, peak, evicted_here, decided_here = cost_by_hand(model, expected, length, produced)
        assert stats.generated_tokens[i] == produced
        assert stats.tokens_seen[i] == length + produced - 1
        assert stats.kv_reads[i] == pytest.approx(reads)
        assert stats.peak_tokens[i] == pytest.approx(peak)
        assert stats.dense_kv_reads[i] == sum(range(length, length + produced))
        evicted, decided = evicted + evicted_here, decided + decided_here
    assert stats.generated_tokens[1] == step + 1 < NEW, "the test is to have a sequence that ends early"
    assert torch.allclose(torch.tensor(stats.evicted_fraction_per_head), evicted / decided)
    assert stats.evicted_fraction == pytest.approx((evicted / decided).mean().item())
    assert stats.achieved_cr == pytest.approx(1 / (1 - stats.evicted_fraction))
    assert stats.kv_reads_mean == pytest.approx(sum(stats.kv_reads) / 3)


@torch.no_grad()
def test_bytes_are_those_of_the_storage():
    """Catches bytes of pairs instead of slots, or of one layer, or of keys only."""
    model = tiny_model()
    out = model.generate(random_tokens(2, PROMPT), return_dict_in_generate=True, **GREEDY)
    stats, layers = model.last_kv_stats, out.past_key_values.layers
    pages = sum(len(layer.pool.owner_P) for layer in layers)
    assert stats.peak_bytes == pages * PAGE_SIZE * HEAD_SIZE * 4 * 2  # fp32, K and V
    heads, entries = 2 * KV_HEADS, model.dms_settings.window + 1
    per_layer = heads * (entries * (4 + 1) + 8 + 8) + 8  # slot and mark; count and last page; pages in use
    assert stats.peak_bookkeeping_bytes == LAYERS * per_layer + pages * (8 + 4)  # owner and fill
    assert stats.dense_bytes == 2 * LAYERS * KV_HEADS * (PROMPT + NEW - 1) * HEAD_SIZE * 4 * 2
    record = json.loads(json.dumps(stats.to_dict()))
    assert "evicted_fraction_per_head" not in record and record["achieved_cr"] == stats.achieved_cr
    assert len(stats.to_dict(per_head=True)["evicted_fraction_per_head"]) == LAYERS


@torch.no_grad()
def test_own_stopping_criteria_end_the_count():
    """Catches ended sequences recognised by their end-of-sequence token only."""

    class FirstRowStopsAtOnce(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([True] + [False] * (input_ids.shape[0] - 1))

    model = tiny_model()
    criteria = [FirstRowStopsAtOnce()]
    model.generate(random_tokens(2, PROMPT), stopping_criteria=criteria, pad_token_id=0, **GREEDY)
    assert model.last_kv_stats.generated_tokens == [1, NEW]


@torch.no_grad()
def test_beam_search():
    """Catches beams whose cache rows are not moved along with them."""
    model, ids_BT = tiny_model(), random_tokens(2, PROMPT)
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9}
    with_cache = model.generate(ids_BT, **beams)
    assert len(model.last_kv_stats.kv_reads) == 6
    assert torch.equal(with_cache, model.generate(ids_BT, use_cache=False, **beams))


@torch.no_grad()
def test_conversation_continues_with_its_cache():
    """Catches a second call that forgets the first, or counts tokens from 0 again."""
    model, ids_BT = tiny_model(), random_tokens(2, PROMPT)
    cache = model.make_cache()
    first = model.generate(ids_BT, past_key_values=cache, **GREEDY)
    more = torch.cat([first, random_tokens(2, 5, seed=7)], dim=1)
    second = model.generate(more, past_key_values=cache, **GREEDY)
    stats = model.last_kv_stats
    assert stats.generated_tokens == [2 * NEW, 2 * NEW]
    assert stats.tokens_seen == [second.shape[1] - 1] * 2
    assert torch.equal(second, greedy_by_hand(model, more))


@torch.no_grad()
def test_disabled_eviction_keeps_everything():
    """Catches dms_disable_eviction being read and ignored."""
    model = tiny_model(dms_disable_eviction=True, offset=-50.0)
    model.generate(random_tokens(1, PROMPT), **GREEDY)
    stats = model.last_kv_stats
    assert stats.achieved_cr == 1.0
    assert stats.kv_reads == stats.dense_kv_reads
    assert stats.peak_tokens == stats.tokens_seen


@torch.no_grad()
def test_everything_evicted_has_no_ratio():
    """Catches a division by zero, and an infinity that JSON cannot hold."""
    model = tiny_model(offset=-50.0)
    model(random_tokens(1, PROMPT))
    assert model.last_kv_stats.evicted_fraction == 1.0
    assert model.last_kv_stats.achieved_cr is None


def test_refusals():
    """Catches modes of generate() that would bypass the cache, or roll it back."""
    model, ids_BT = tiny_model(), random_tokens(1, PROMPT)
    assert model.last_kv_stats is None
    with pytest.raises(ValueError, match="static"):
        model.generate(ids_BT, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids_BT, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids_BT, assistant_model=tiny_model(), **GREEDY)


@torch.no_grad()
def test_guidance_counts_its_own_branch_only():
    """guidance_scale runs a second branch, with a cache of its own, after each step. Catches: statistics of
    that branch, in which no token was generated from the prompt."""
    model, ids_BT = tiny_model(), random_tokens(2, PROMPT)
    model.generate(ids_BT, guidance_scale=1.5, negative_prompt_ids=random_tokens(2, 3), **GREEDY)
    stats = model.last_kv_stats
    assert stats.generated_tokens == [NEW] * 2
    assert stats.tokens_seen == [PROMPT + NEW - 1] * 2
    assert stats.dense_kv_reads == [sum(range(PROMPT, PROMPT + NEW))] * 2
