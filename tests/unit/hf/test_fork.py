"""A prompt for several sequences is computed once, and a cache that failed half-way says so."""

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_dms.hf import modeling_dms, pages_dms
from tests.support.generation_by_hand import PROMPT, left_padded
from tests.support.tiny_dms_models import KV_HEADS, LAYERS, random_tokens, tiny_model

NEW = 9
SEVERAL = {
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
}


def count_tokens(model):
    """Return a list that gets [rows, tokens] of every forward of the first layer."""
    sizes = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[:2])))
    return sizes


def prompts(short=8):
    return left_padded(random_tokens(1, PROMPT), random_tokens(1, short, seed=3))


@pytest.mark.parametrize("how", SEVERAL)
@pytest.mark.parametrize("chunk", [None, 5, 4])  # 13 tokens in chunks of 4: the last one is a single token
@torch.no_grad()
def test_a_prompt_is_computed_once_for_all_its_sequences(how, chunk, monkeypatch):
    """Catches prefill forwards over repeated rows, a cache forked in another order than the batch, beams
    reordered before the fork, and sequences missing from the statistics."""
    model = tiny_model()
    refused = chunk and transformers.__version__ < "5"  # chunks of padding
    inputs = prompts(PROMPT if refused else 8) | SEVERAL[how]
    inputs |= {"max_new_tokens": NEW, "prefill_chunk_size": chunk}
    sizes = count_tokens(model)
    torch.manual_seed(0)
    forked, forked_stats = model.generate(**inputs), model.last_kv_stats
    once = sizes.copy()
    sizes.clear()
    # As it was before: the cache is forked while it is empty, and every row is computed.
    monkeypatch.setattr(modeling_dms, "first_of_equal_rows", lambda inputs, cache, B, T: cache.fork() or 1)
    torch.manual_seed(0)
    assert torch.equal(forked, model.generate(**inputs))
    # Allocated bytes differ: the fork brings a few spare pages along.
    forked_stats, stats = (
        replace(s, peak_bytes=0, peak_bookkeeping_bytes=0) for s in (forked_stats, model.last_kv_stats)
    )
    assert forked_stats == stats
    assert [rows for rows, tokens in sizes if tokens > 1] == [6] * len([1 for _, t in once if t > 1])
    assert {rows for rows, tokens in once if tokens > 1} == {2}
    assert {rows for rows, tokens in once if tokens == 1} == {6}


@torch.no_grad()
def test_hidden_states_and_embeddings_follow():
    """Catches outputs of the base model with fewer rows than its input, and inputs_embeds left whole."""
    model, cache = tiny_model(), tiny_model().make_cache()
    ids_BT = random_tokens(2, PROMPT).repeat_interleave(3, dim=0)
    sizes = count_tokens(model)
    cache.copies = 3
    embeds = model.model.embed_tokens(ids_BT)
    out = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert sizes == [(2, PROMPT)]
    expected = model(ids_BT, use_cache=False, output_hidden_states=True)
    for mine, other in zip(
        (out.logits, *out.hidden_states), (expected.logits, *expected.hidden_states), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("differs", ["input_ids", "attention_mask", "second chunk"])
@torch.no_grad()
def test_rows_that_differ_are_not_taken_for_one(differs):
    """Catches every n-th row computed although the others are not its copies, in any chunk of a prompt."""
    model = tiny_model()
    ids_BT = random_tokens(2, PROMPT).repeat_interleave(2, dim=0)
    mask_BT = torch.ones_like(ids_BT)
    if differs == "attention_mask":
        mask_BT[1, :2] = 0
    else:
        ids_BT[3, 2 if differs == "input_ids" else 9] += 1
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    cache = model.make_cache()
    cache.copies = 2
    parts = []
    for start, stop in ((0, 5), (5, PROMPT)):
        part = model(
            ids_BT[:, start:stop],
            attention_mask=mask_BT[:, :stop],
            position_ids=position_BT[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(part.logits)
    expected = model(ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False).logits
    real_BT = mask_BT.bool()
    assert torch.allclose(torch.cat(parts, dim=1)[real_BT], expected[real_BT], atol=1e-4)
    assert cache.copies == 1
    assert cache.meter.stats().tokens_seen == mask_BT.sum(dim=1).tolist()


@pytest.mark.parametrize("agree", [False, True])
@torch.no_grad()
def test_a_conversation_goes_on_from_an_unforked_cache(agree):
    """Catches a cache still standing for copies when the next turn's rows, which differ, come in; and, where
    they agree, figures counted for the copies together that are counted apart already."""
    model, prompt = tiny_model(), random_tokens(2, PROMPT)
    cache = model.make_cache()
    first = model.generate(
        prompt, past_key_values=cache, max_new_tokens=1, do_sample=True, num_return_sequences=2
    )
    assert len(model.last_kv_stats.generated_tokens) == 4
    more = torch.cat([first, random_tokens(4, 5, seed=8)], dim=1)
    if agree:
        more = more[::2].repeat_interleave(2, dim=0)
    second = model.generate(more, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert model.last_kv_stats.generated_tokens == [1 + NEW] * 4
    assert torch.equal(second, model.generate(more, max_new_tokens=NEW, do_sample=False))


class Exhausted:
    """Stands for pages_dms.allocate: the `fail_at`-th call from now on runs out of memory, and so do later
    calls."""

    def __init__(self, fail_at):
        self.left = fail_at
        self.allocate = pages_dms.allocate

    def __call__(self, pages, like):
        self.left -= 1
        if self.left <= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return self.allocate(pages, like)


@pytest.mark.parametrize("where", ["prompt", "step", "fork"])
@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])  # keys or values, of the first layer or of the second
@torch.no_grad()
def test_out_of_memory_breaks_that_cache_only(where, fail_at, monkeypatch):
    """Catches a cache used on with layers that are a token or a selection apart, and a process that cannot
    generate any more after one request was too large."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 4)
    model, ids_BT = tiny_model(dms_disable_eviction=True), random_tokens(2, 40)
    expected = model.generate(ids_BT[:, :PROMPT], max_new_tokens=NEW, do_sample=False)
    cache = model.make_cache()
    if where != "prompt":
        model(ids_BT[:, :PROMPT], past_key_values=cache, use_cache=True)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="simulated"):
        patch.setattr(pages_dms, "allocate", Exhausted(fail_at))
        if where == "fork":
            cache.batch_repeat_interleave(2)
        elif where == "prompt":
            model(ids_BT, past_key_values=cache, use_cache=True)
        else:
            for t in range(PROMPT, 40):
                model(ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True)
    for use in (
        lambda: model(ids_BT[:, -1:], past_key_values=cache, use_cache=True),
        lambda: model.generate(ids_BT, past_key_values=cache, max_new_tokens=NEW),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        with pytest.raises(RuntimeError, match="unusable: an earlier forward with it failed"):
            use()
    assert torch.equal(model.generate(ids_BT[:, :PROMPT], max_new_tokens=NEW, do_sample=False), expected)
    cache.reset()
    again = model.generate(ids_BT[:, :PROMPT], past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again, expected)
    assert len(cache.layers) == LAYERS and cache.layers[0].held_BG.shape == (2, KV_HEADS)
