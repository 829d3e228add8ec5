"""The cache that forgets: in whatever chunks the tokens come in, the logits are those of the masked
forward."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from megatron_dms.hf import pages_dms
from megatron_dms.hf.cache_dms import CACHE_NAME, CACHE_NAMES
from tests.support.dms_by_definition import held_pairs, reference
from tests.support.generation_by_hand import feed
from tests.support.tiny_dms_models import FAMILIES_AND_SETTINGS, KV_HEADS, LAYERS, random_tokens, tiny_model

T = 23


def held(cache):
    """Return the number of pairs in the cache, [layers, B, KV heads]."""
    return torch.stack([layer.held_BG for layer in cache.layers])


@pytest.mark.parametrize(("family", "setting"), FAMILIES_AND_SETTINGS)
@torch.no_grad()
def test_chunks_and_steps_equal_the_masked_forward(family, setting):
    """Catches, in cache_dms.py: a pair dropped one step too early, a decision lost between forwards (lag
    across a chunk border), a new pair written over a live one, a stale mark left in a reused slot; and any
    head holding a pair more or less than the definition says."""
    predictor, granularity, (window, lag) = setting
    model = tiny_model(family, predictor=predictor, granularity=granularity, window=window, lag=lag)
    ids_BT = random_tokens(2, T)
    whole = model(ids_BT, use_cache=False).logits
    largest = 0.0
    for sizes in ([T], [1], [5], [11, 1]):
        cache = model.make_cache()
        largest = max(largest, (feed(model, cache, ids_BT, sizes) - whole).abs().max().item())
        assert cache.get_seq_length() == T
        if sizes in ([1], [5]):
            counts = held(cache)
            for b in range(2):
                decision = reference(model, ids_BT[b]).decision.tolist()
                expected = [[held_pairs(head, T, window, lag) for head in layer] for layer in decision]
                assert counts[:, b].tolist() == expected
    print(f"largest difference {largest:.1e}")
    assert largest < 1e-4


@torch.no_grad()
def test_evicted_slots_are_reused():
    """Catches a new pair appended although one was evicted: storage follows the pairs held."""
    model = tiny_model(window=3, offset=-50.0)  # everything is evicted
    cache = model.make_cache()
    feed(model, cache, random_tokens(1, 60), [1])
    assert held(cache).unique().tolist() == [4]
    assert all(int(layer.pool.used) == KV_HEADS for layer in cache.layers), "more than a page per head"


@torch.no_grad()
def test_each_pair_has_a_slot_of_its_own():
    """Catches heads that share a page, and two pairs in one slot: each key written lies there once."""
    model = tiny_model()
    cache = model.make_cache()
    feed(model, cache, random_tokens(1, 60), [1])
    counts = held(cache)[:, 0]
    assert len(counts.unique()) > 1
    for layer, count_G in zip(cache.layers, counts, strict=True):
        slot_NK, exists_NK = layer.pool.slots_by_head()
        live = slot_NK[exists_NK]
        assert len(live) == len(live.unique()) == count_G.sum()
        keys = layer.pool.keys_PSD.flatten(0, 1)
        assert len(keys[live].unique(dim=0)) == len(live)
        assert (keys.abs().sum(dim=1) > 0).sum() == len(live)


@pytest.mark.parametrize("padding", [list(range(8)), [0, 3, 4, 9, 10, 11, 17, 22]], ids=["left", "anywhere"])
@pytest.mark.parametrize("sizes", [[T], [11, 1], [2, 9, 5, 1]])
@torch.no_grad()
def test_padding_changes_nothing(padding, sizes):
    """Catches padding that is stored or seen, and windows or lags counted in columns instead of tokens (among
    the chunks are some that are all padding for the second sequence)."""
    model = tiny_model(lag=2)
    long, short = random_tokens(1, T), random_tokens(1, T - 8, seed=2)
    real_T = torch.ones(T, dtype=torch.bool)
    real_T[padding] = False
    ids_BT = long.repeat(2, 1)
    ids_BT[1, real_T] = short[0]  # in the padding stand real tokens, which must not matter
    mask_BT = torch.stack([torch.ones(T), real_T]).long()
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    single = [model(ids, use_cache=False).logits[0] for ids in (long, short)]

    plain = model(ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False).logits
    cache, start, chunks = model.make_cache(), 0, []
    remaining = list(sizes)
    while start < T:
        stop = start + (remaining.pop(0) if len(remaining) > 1 else remaining[0])
        chunk = model(
            ids_BT[:, start:stop],
            attention_mask=mask_BT[:, :stop],
            position_ids=position_BT[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        chunks.append(chunk.logits)
        start = stop
    for logits in (plain, torch.cat(chunks, dim=1)):
        assert torch.allclose(logits[0], single[0], atol=1e-4)
        assert torch.allclose(logits[1, real_T], single[1], atol=1e-4)
        assert logits.isfinite().all()
    assert cache.seen_B.tolist() == [T, T - 8]
    alone = model.make_cache()
    feed(model, alone, short, [T])
    assert torch.equal(held(cache)[:, 1], held(alone)[:, 0])


@torch.no_grad()
def test_long_prompts_are_taken_in_blocks_of_queries(monkeypatch):
    """Catches a block of queries with the keys of another block (only long prompts would show it)."""
    import megatron_dms.hf.sparse_attention_dms as sparse

    model, ids_BT = tiny_model(), random_tokens(2, T)
    whole = model(ids_BT, use_cache=False).logits
    monkeypatch.setattr(sparse, "MAX_MASK_ELEMENTS", 2 * KV_HEADS * T * 5)
    assert torch.allclose(model(ids_BT, use_cache=False).logits, whole, atol=1e-5)
    cache = model.make_cache()
    assert torch.allclose(feed(model, cache, ids_BT, [7]), whole, atol=1e-4)


@torch.no_grad()
def test_steps_between_chunks():
    """Catches free slots remembered from before a chunk that has used them up (where nothing is evicted)."""
    model, ids_BT = tiny_model(dms_disable_eviction=True), random_tokens(1, T)
    cache = model.make_cache()
    logits = feed(model, cache, ids_BT, [1, 19, 1])
    assert torch.allclose(logits, model(ids_BT, use_cache=False).logits, atol=1e-4)
    assert held(cache).unique().tolist() == [T]


@torch.no_grad()
def test_sequences_can_be_reordered():
    """Catches a tensor of the cache left behind when a beam search permutes the batch: slots, marks, and how
    many tokens each sequence has had (the third has two columns of padding)."""
    model, ids_BT = tiny_model(), random_tokens(3, T)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[2, :2] = 0
    whole = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    cache, order = model.make_cache(), torch.tensor([2, 0, 0])
    feed(model, cache, ids_BT[:, :11], [11], attention_mask=mask_BT[:, :11])
    cache.reorder_cache(order)
    rest = feed(model, cache, ids_BT[order, 11:], [1])
    assert torch.allclose(rest, whole[order, 11:], atol=1e-4)
    assert cache.meter.stats().tokens_seen == [T - 2, T, T]


@torch.no_grad()
def test_reset_starts_anew():
    """Catches state that survives Cache.reset: positions, marks, the batch size, or tokens counted so far."""
    model, ids_BT = tiny_model(), random_tokens(2, T)
    cache, fresh = model.make_cache(), model.make_cache()
    feed(model, cache, ids_BT, [5])
    cache.reset()
    assert cache.get_seq_length() == 0
    one = ids_BT[:1]
    assert torch.equal(feed(model, cache, one, [5]), feed(model, fresh, one, [5]))
    assert cache.meter.stats() == fresh.meter.stats()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_number_types(dtype):
    """Catches a tensor made in fp32 whatever the model's type: slots, masks, or the decision."""
    model, ids_BT = tiny_model().to(dtype), random_tokens(2, T)
    cache = model.make_cache()
    logits = feed(model, cache, ids_BT, [11, 1])
    assert logits.dtype == cache.layers[0].pool.keys_PSD.dtype == dtype
    if dtype == torch.float64:
        assert torch.allclose(logits, model(ids_BT, use_cache=False).logits, atol=1e-6)


def test_decisions_are_made_in_fp32():
    """Catches z = scale * raw - offset in bf16, where 100 * 0.05005 rounds to 5 and nothing is evicted."""
    model = tiny_model(dms_alpha_scale=100.0, offset=5.0).to(torch.bfloat16)
    q_BHTD = torch.full((1, 4, 1, 16), 0.05, dtype=torch.bfloat16)  # 0.05005 in bf16
    assert model.model.layers[0].self_attn.decide(q_BHTD, q_BHTD[:, :2], None).all()


def test_gradients_and_copies():
    """Catches hooks bound to the original model, and decisions counted twice by gradient checkpointing."""
    model, ids_BT = tiny_model(predictor="linear"), random_tokens(2, T)
    twin = copy.deepcopy(model).train()
    twin.gradient_checkpointing_enable()
    loss = twin(ids_BT, labels=ids_BT).loss
    loss.backward()
    assert torch.allclose(loss, model(ids_BT, labels=ids_BT, use_cache=False).loss, atol=1e-5)
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in twin.model.layers)
    assert twin.last_kv_stats == model.last_kv_stats
    assert twin._dms_meter is not model._dms_meter


def test_a_step_has_the_gradient_of_its_own_token():
    """Catches a step with gradients that reads its own pair from the pages, which have none, and pages that
    a graph holds on to while later steps write into them."""
    model, ids_BT = tiny_model(), random_tokens(1, T)
    cache = model.make_cache()
    with torch.no_grad():
        feed(model, cache, ids_BT[:, :-3], [T])
    losses = [model(ids_BT[:, t : t + 1], past_key_values=cache).logits.sum() for t in range(T - 3, T)]
    sum(losses).backward()
    # Of the value of a step's token, some is read; a query alone would leave v_proj without a gradient.
    assert all(layer.self_attn.v_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    other = model.make_cache()
    with torch.no_grad():
        assert torch.allclose(feed(model, other, ids_BT, [T - 3, 1])[:, -3:].sum(), sum(losses), rtol=1e-4)


@pytest.mark.parametrize(
    "modes", list(itertools.permutations(["inference", "no_grad", "grad"])), ids="-".join
)
def test_caches_cross_the_borders_of_inference_mode(modes, monkeypatch):
    """Catches a tensor of the cache, its pools or its meter that is made under torch.inference_mode, in a
    prompt, a growth, a reorder or a first step: nothing outside could write it."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 2)
    contexts = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    model, ids_BT = tiny_model(), random_tokens(3, 2 * T)
    order = torch.tensor([2, 0, 1])
    whole = model(ids_BT, use_cache=False).logits.detach()
    cache, start = model.make_cache(), 0
    for mode in modes:
        with contexts[mode]():
            if start:
                cache.reorder_cache(order)
                ids_BT, whole = ids_BT[order], whole[order]
            for size in (5, 1, 1, 1, 1):
                part = model(ids_BT[:, start : start + size], past_key_values=cache)
                start += size
                assert torch.allclose(part.logits, whole[:, start - size : start], atol=1e-4)
                cache.meter.count_generated(torch.tensor([False, False, start > 12]))
            cache.meter.restart_sequences()
        assert not any(part.is_inference() for part in cache.state)
    cache = model.make_cache()
    several = {"num_return_sequences": 2, "do_sample": True, "past_key_values": cache}
    with contexts[modes[0]]():
        out_BT = model.generate(ids_BT[:, :T], max_new_tokens=1, **several)
    mask_BT = torch.ones_like(out_BT)  # else a sampled 0 would be taken for padding
    with contexts[modes[1]]():
        model.generate(out_BT, attention_mask=mask_BT, max_new_tokens=3, past_key_values=cache)
    assert model.last_kv_stats.tokens_seen == [T + 3] * 6


@torch.no_grad()
def test_refusals():
    """Catches what would otherwise run and be wrong: each is refused by name."""
    model, ids_BT = tiny_model(), random_tokens(2, T)
    cache = model.make_cache()
    feed(model, cache, ids_BT, [T])
    with pytest.raises(NotImplementedError, match="evicted pairs are gone"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="eviction decisions"):
        cache.update(torch.zeros(2, KV_HEADS, 1, 16), torch.zeros(2, KV_HEADS, 1, 16), 0)
    with pytest.raises(ValueError, match="holds 2 sequences"):
        model(ids_BT[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="window, lag"):
        model(ids_BT, past_key_values=tiny_model(window=4).make_cache())
    with pytest.raises(TypeError, match="StaticCache"):
        model(ids_BT, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids_BT, attention_mask=torch.ones(2, 1, T, T))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids_BT, past_key_values=cache, attention_mask=torch.ones(2, T))
    with pytest.raises(ValueError, match="packed"):
        model(ids_BT, position_ids=torch.cat([torch.arange(11), torch.arange(12)])[None])
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids_BT, output_attentions=True)
    with pytest.raises(ValueError, match="sliding"):
        tiny_model(use_sliding_window=True, sliding_window=4, max_window_layers=1)


@torch.no_grad()
def test_an_empty_dynamic_cache_is_replaced():
    """Catches a DynamicCache that transformers makes by itself being filled with every pair."""
    model = tiny_model()
    out = model(random_tokens(1, T), past_key_values=DynamicCache(config=model.config), use_cache=True)
    assert type(out.past_key_values).__name__ == "DMSCache"
    assert type(model(random_tokens(1, T)).past_key_values).__name__ == "DMSCache"
    assert len(out.past_key_values.layers) == LAYERS


@torch.no_grad()
def test_a_cache_goes_by_two_names():
    """Catches a cache that is ignored because another release of transformers calls the argument so, and a
    cache under a name that this release does not know."""
    model, ids_BT = tiny_model(), random_tokens(2, T)
    for part in (model, model.model):
        for name in CACHE_NAMES:
            cache = model.make_cache()
            out = part(ids_BT, use_cache=True, **{name: cache})
            assert cache.get_seq_length() == T and out[CACHE_NAME] is cache
        cache = model.make_cache()
        part(ids_BT, None, None, cache)
        assert cache.get_seq_length() == T
    with pytest.raises(ValueError, match="two names of one argument"):
        model.model(ids_BT, **dict.fromkeys(CACHE_NAMES, cache))


def test_tokens_taken_in_cannot_become_padding():
    """Catches a further turn whose mask hides what the cache holds, as after sequences that ended at
    different tokens: the zeros would be dropped, and the pairs read all the same."""
    model, ids_BT = tiny_model("qwen3"), random_tokens(2, 9)
    cache = model.make_cache()
    feed(model, cache, ids_BT[:, :5], [5])
    mask_BT = torch.ones(2, 9, dtype=torch.int64)
    mask_BT[1, 4] = 0  # was a real token when it went in
    with pytest.raises(ValueError, match="hides tokens that the cache has taken in"):
        model(ids_BT[:, 5:], past_key_values=cache, attention_mask=mask_BT, use_cache=True)
