"""Pages, rings and slots by themselves, without a model, against lists of pairs kept by the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dms.hf import pages_dms
from megatron_dms.hf.cache_dms import DMSCache
from megatron_dms.hf.cache_layer_dms import DMSCacheLayer
from megatron_dms.hf.page_attention_dms import PAGE_ATTENTION, attend_pages, page_attention
from megatron_dms.hf.sparse_attention_dms import NewTokens, attend
from tests.support.dms_by_definition import is_gone
from tests.support.tiny_dms_models import random_tokens, tiny_model

GROUPS, QUERIES, SIZE = 2, 2, 4
SCALE = 0.7


def random_tensor(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def softmax_over_pairs(q_RD, k_KD, v_KD, scale):
    """Attend without pages: [R, D], and 0 where there is no pair."""
    if not len(k_KD):
        return q_RD.new_zeros(len(q_RD), v_KD.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q_RD[None], k_KD[None], v_KD[None], scale=scale)[
        0
    ]


# ---- attention over pages ----


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("pages", [0, 1, 7, 40])
def test_attention_over_pages_is_sdpa_over_the_pairs(heads, pages):
    """Catches, in page_attention_dms.py: empty slots or free pages that are read, a softmax per page instead
    of per head, a maximum of another head (scores are far apart), 0 / 0 for a head or page without pairs."""
    S, D, value_size = 8, 16, 12
    generator = torch.Generator().manual_seed(pages)
    owner_P = torch.randint(0, heads + 1, (pages,), generator=generator)
    owner_P[owner_P == 1] = 0  # of several heads, one has nothing
    fill_P = torch.randint(0, S + 1, (pages,), generator=generator).int()
    if pages:
        fill_P[0] = 0  # an owned page without pairs, and a full one
        fill_P[-1] = S
    keys_PSD, values_PSD = random_tensor(pages, S, D) * 30, random_tensor(pages, S, value_size, seed=1)
    keys_PSD[owner_P == 0] += 40
    q_NRD = random_tensor(heads, 3, D, seed=2)
    out_NRD = attend_pages(q_NRD, keys_PSD, values_PSD, owner_P, fill_P, 0.3)
    assert out_NRD.dtype == torch.float64 and out_NRD.shape == (heads, 3, value_size)
    for n in range(heads):
        own = [(p, int(fill_P[p])) for p in range(pages) if owner_P[p] == n]
        k_KD = torch.cat([keys_PSD[p, :fill] for p, fill in own] or [keys_PSD.new_zeros(0, D)])
        v_KD = torch.cat([values_PSD[p, :fill] for p, fill in own] or [values_PSD.new_zeros(0, value_size)])
        expected = softmax_over_pairs(q_NRD[n], k_KD, v_KD, 0.3)
        assert (out_NRD[n] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_fp32(dtype):
    """Catches exponentials added up in half precision: in bf16 the sum of 4096 ones stops at 256."""
    pages, S, D = 64, 64, 16
    keys_PSD, values_PSD = torch.zeros(pages, S, D, dtype=dtype), torch.ones(pages, S, D, dtype=dtype)
    values_PSD[1::2] = 3
    owner_P, fill_P = torch.zeros(pages, dtype=torch.int64), torch.full((pages,), S, dtype=torch.int32)
    out = attend_pages(torch.ones(1, 4, D, dtype=dtype), keys_PSD, values_PSD, owner_P, fill_P, 1.0)
    assert out.dtype == dtype
    assert torch.equal(out, torch.full_like(out, 2.0))


def test_the_named_attention_is_the_one_that_runs(monkeypatch):
    """Catches a name that is ignored, and another implementation taken in place of one that is not there."""
    calls = []

    def counted(*args):
        calls.append(len(args))
        return attend_pages(*args)

    with pytest.raises(ValueError, match=r"'counted', expected one of .*'torch'"):
        page_attention("counted")
    monkeypatch.setitem(PAGE_ATTENTION, "counted", counted)
    layer = DMSCache(1, 3, 1, attend_with="counted").layers[0]
    feed_layer(layer, [0], 1, seed=0)
    assert calls == [6]


# ---- one layer of the cache ----


def feed_layer(layer, before, T, seed, real_BT=None, evict=None, dtype=torch.float64):
    """T new columns for sequences with `before` tokens; returns what went in, and the output.

    q [B, H, T, D], k, v [B, G, T, D], evict [B, G, T], NewTokens, output [B, H, T, D].
    """
    B = len(before)
    q = random_tensor(B, GROUPS * QUERIES, T, SIZE, seed=seed, dtype=dtype)
    k, v = (random_tensor(B, GROUPS, T, SIZE, seed=seed + i, dtype=dtype) for i in (1, 2))
    if evict is None:
        evict = random_tensor(B, GROUPS, T, seed=seed + 3) > -0.5
    new = NewTokens.place(torch.tensor(before), T, real_BT)
    pairs = layer.extend(k, v, evict, new)
    if pairs is None:
        out = layer.attend(q, SCALE)
    else:
        out = attend(q, pairs, new, layer.window, SCALE)
    return q, k, v, evict, new, out


def check_pool(layer, expected):
    """The pool holds exactly the `expected` pairs, {(b, g): set of key tuples}, and its books are right."""
    pool, S = layer.pool, layer.pool.keys_PSD.shape[1]
    used = int(pool.used)
    N, P = len(pool.count_N), len(pool.owner_P)
    assert (pool.owner_P[:used] < N).all() and (pool.owner_P[used:] == N).all()
    assert (pool.fill_P[used:] == 0).all() and used <= P
    for n in range(N):
        own = [p for p in range(used) if pool.owner_P[p] == n]
        held = [tuple(key.tolist()) for p in own for key in pool.keys_PSD[p, : pool.fill_P[p]]]
        assert len(held) == pool.count_N[n]
        assert set(held) == expected[n // GROUPS, n % GROUPS] and len(set(held)) == len(held)
        assert len(own) == -(-len(held) // S), "a page that is not needed"
        assert not own or pool.last_page_N[n] == own[-1]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_way_of_feeding_keeps_the_pairs_of_the_definition(data):
    """Catches, in cache_layer_dms.py and pages_dms.py, with windows 0 to 5 and every lag that goes with them:
    a ring entry or its mark off by one, a mark that comes after its pair's chunk, padding that is written or
    counted, a slot given to two pairs or lost, a page opened too late or for another head, pairs that stay
    behind when sequences are reordered, too few pages after a count of sure steps."""
    window = data.draw(st.integers(0, 5), label="window")
    lag = data.draw(st.integers(0, window + 1), label="lag")
    share = data.draw(st.sampled_from([-9.0, -0.5, 0.5, 9.0]), label="evict above")
    page = data.draw(st.sampled_from([1, 2, 4, 16]), label="page size")
    patch = pytest.MonkeyPatch()
    patch.setattr(pages_dms, "PAGE_SIZE", page)
    try:
        layer = DMSCacheLayer(window, lag)
        B = data.draw(st.integers(1, 3), label="sequences")
        past = [[] for _ in range(B)]  # per sequence: (k, v, evict), each of [G, ...]
        forwards = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 9]), min_size=1, max_size=25))
        for i, T in enumerate(forwards):
            real_BT = None
            if data.draw(st.integers(0, 3), label="padding") == 0:
                real_BT = random_tensor(len(past), T, seed=1000 + i) > 0
            elif data.draw(st.integers(0, 7), label="reorder") == 0 and i:
                index = data.draw(st.lists(st.integers(0, len(past) - 1), min_size=1, max_size=3))
                layer.select_sequences(torch.tensor(index))
                past = [list(past[b]) for b in index]
            chance = random_tensor(len(past), GROUPS, T, seed=2000 + i) > share
            before = [len(tokens) for tokens in past]
            q, k, v, evict, new, out = feed_layer(layer, before, T, 10 * i, real_BT, chance)
            for b, tokens in enumerate(past):
                for t in range(T):
                    if new.position_BT[b, t] < 0:
                        continue
                    assert new.position_BT[b, t] == len(tokens)
                    tokens.append((k[b, :, t], v[b, :, t], evict[b, :, t]))
                    check_output(out[b, :, t], q[b, :, t], tokens, window, lag)
            check_pool(
                layer, {(b, g): live_keys(past[b], g, window, lag) for b in range(len(past)) for g in (0, 1)}
            )
    finally:
        patch.undo()


def live(tokens, g, window, lag):
    """Return the positions that head g holds after these tokens: those that the last token reads."""
    decision = [bool(evict[g]) for _, _, evict in tokens]
    last = len(tokens) - 1
    return [j for j in range(len(tokens)) if not is_gone(decision, j, last, window, lag)]


def live_keys(tokens, g, window, lag):
    return {tuple(tokens[j][0][g].tolist()) for j in live(tokens, g, window, lag)}


def check_output(out_HD, q_HD, tokens, window, lag):
    for g in range(GROUPS):
        positions = live(tokens, g, window, lag)
        k_KD = torch.stack([tokens[j][0][g] for j in positions])
        v_KD = torch.stack([tokens[j][1][g] for j in positions])
        heads = slice(g * QUERIES, (g + 1) * QUERIES)
        assert (out_HD[heads] - softmax_over_pairs(q_HD[heads], k_KD, v_KD, SCALE)).abs().max() < 1e-12


def test_unequal_heads_share_the_pool():
    """Catches storage as wide as the fullest head: one head keeps everything, the other its window only."""
    layer, tokens = DMSCacheLayer(window=15, lag=1), 1000
    evict = torch.tensor([False, True])[None, :, None]
    feed_layer(layer, [0], 600, seed=0, evict=evict.expand(1, GROUPS, 600))
    for t in range(600, tokens):
        feed_layer(layer, [t], 1, seed=t, evict=evict)
    assert layer.held_BG.tolist() == [[tokens, 16]]
    needed = -(-tokens // pages_dms.PAGE_SIZE) + 1
    assert int(layer.pool.used) == needed
    assert len(layer.pool.owner_P) <= needed + pages_dms.MIN_GROWTH


def test_the_pool_grows_seldom_and_by_a_sixteenth(monkeypatch):
    """Catches a copy of the whole pool at every new page, growth that doubles, and steps that ask the device
    each time: 4000 steps of two heads that keep everything."""
    sizes, real_pages, asked = [], pages_dms.allocate, []

    def counted(pages, like):
        sizes.append(pages)
        return real_pages(pages, like)

    real_tolist = torch.Tensor.tolist
    monkeypatch.setattr(pages_dms, "allocate", counted)
    layer = DMSCacheLayer(window=3, lag=1)
    keep = torch.zeros(1, GROUPS, 1, dtype=torch.bool)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: asked.append(1) or real_tolist(t))
    for t in range(4000):
        feed_layer(layer, [t], 1, seed=t, evict=keep)
    monkeypatch.undo()
    used = int(layer.pool.used)
    print(f"{len(sizes) // 2} growths, asked {len(asked)} times")
    assert used == 2 * 63
    assert sizes[0::2] == sizes[1::2] == sorted(set(sizes)), "keys and values grow together, and only grow"
    assert all(
        b - a <= max(pages_dms.MIN_GROWTH, a // pages_dms.GROWTH)
        for a, b in zip(sizes[::2], sizes[2::2], strict=False)
    )
    assert len(sizes) // 2 <= 45, "with a growth for each page there would be 63"
    assert len(asked) <= 50


@pytest.mark.parametrize("chunk", [1024, 4096])
def test_bytes_are_those_of_the_live_pairs(chunk):
    """Catches padding to the fullest head, growth that is not given back in size, and whole pages per window:
    32K tokens, window 256, an eighth of the pairs kept (in one head more than in the other)."""
    T, window, D = 32768, 256, 16
    layer = DMSCacheLayer(window, lag=1)
    chance_GT = torch.rand(GROUPS, T + 1, generator=torch.Generator().manual_seed(5))
    evict_BGT = (chance_GT > torch.tensor([[0.05], [0.20]]))[None]
    x_BGTD = torch.zeros(1, GROUPS, T + 64, D, dtype=torch.bfloat16)
    evict_BGT = torch.nn.functional.pad(evict_BGT, (0, 63))
    start, worst = 0, 0.0
    while start < T + 64:
        stop = min(start + chunk, T) if start < T else start + 1
        part = x_BGTD[:, :, start:stop]
        layer.extend(
            part,
            part,
            evict_BGT[:, :, start:stop],
            NewTokens.place(torch.tensor([start]), stop - start, None),
        )
        start = stop
        live_bytes = int(layer.held_BG.sum()) * 2 * D * 2
        if start >= T:
            worst = max(worst, layer.kv_bytes / live_bytes)
    dense_bytes = GROUPS * (T + 64) * 2 * D * 2
    print(
        f"allocated / live {worst:.3f}, allocated / dense {layer.kv_bytes / dense_bytes:.3f}, "
        f"bookkeeping {layer.bookkeeping_bytes} bytes"
    )
    assert layer.held_BG[0, 1] > 3 * layer.held_BG[0, 0]
    assert worst <= 1.15
    assert layer.kv_bytes <= 0.16 * dense_bytes
    assert (
        layer.bookkeeping_bytes <= GROUPS * (window + 1) * 5 + len(layer.pool.owner_P) * 12 + GROUPS * 16 + 8
    )


# ---- selecting sequences ----


def test_identity_selection_copies_nothing():
    """Catches a copy of all pages at each step of a beam search whose beams stay where they are."""
    cache = DMSCache(1, 3, 1)
    feed_layer(cache.layers[0], [0, 0], 9, seed=0)
    cache.place(2, 9, None, torch.device("cpu"))
    keys = cache.layers[0].pool.keys_PSD
    cache.reorder_cache(torch.tensor([0, 1]))
    assert cache.layers[0].pool.keys_PSD is keys
    cache.reorder_cache(torch.tensor([1, 1]))
    moved = cache.layers[0].pool.keys_PSD
    assert moved is not keys
    cache.reorder_cache(torch.tensor([0, 1]))
    assert cache.layers[0].pool.keys_PSD is moved
    cache.reorder_cache(torch.tensor([0]))
    assert cache.layers[0].held_BG.shape == (1, GROUPS)


@torch.no_grad()
def test_a_nan_stays_in_its_sequence():
    """Catches: missing pairs of a short head read from another sequence's page, where 0 * NaN is NaN."""
    model = tiny_model()
    cache = model.make_cache()
    embedded = model.model.embed_tokens(random_tokens(2, 30))
    embedded[0, -1] = float("nan")
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :25] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = model(random_tokens(2, 3), past_key_values=cache).logits
    assert logits[0].isnan().any() and not logits[1].isnan().any()


@torch.no_grad()
def test_what_breaks_off_while_sequences_move_is_refused(monkeypatch):
    """Catches: a reorder declared finished before the meter has moved too, or a type that changes."""
    model = tiny_model()
    cache = model.make_cache()
    model(random_tokens(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="one cache, one type"):
        tiny_model().double()(random_tokens(2, 1), past_key_values=cache)
    cache = model.make_cache()
    model(random_tokens(2, 9), past_key_values=cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.meter, "select_sequences", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(RuntimeError, match="unusable"):
        model(random_tokens(2, 1), past_key_values=cache)
    cache.reset()
    model(random_tokens(2, 9), past_key_values=cache)
