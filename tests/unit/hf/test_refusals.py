"""Positions and caches that do not fit the model are refused, and the cache stays as it was."""

import copy
import logging

import pytest
import torch
import transformers
from transformers import StoppingCriteria

from megatron_dms.hf import refusals_dms
from tests.support.generation_by_hand import feed, left_padded
from tests.support.tiny_dms_models import random_tokens, tiny_model

POSITIONS = 24


def small_model(**settings):
    return tiny_model(max_position_embeddings=POSITIONS, **settings)


@torch.no_grad()
def test_input_beyond_the_positions():
    """Catches a check after the cache has taken the tokens in, or one that forgets what came before."""
    model, ids_BT = small_model(), random_tokens(2, POSITIONS + 1)
    with pytest.raises(ValueError, match="ends at token 25, the model has 24 positions"):
        model(ids_BT, use_cache=False)
    cache = model.make_cache()
    feed(model, cache, ids_BT[:, :20], [7, 13])
    for tokens in (5, 6):
        with pytest.raises(ValueError, match=f"ends at token {20 + tokens}, the model has 24 positions"):
            model(random_tokens(2, tokens), past_key_values=cache, use_cache=True)
    rest = feed(model, cache, ids_BT[:, 20:24], [3, 1])
    assert torch.allclose(rest, model(ids_BT[:, :24], use_cache=False).logits[:, 20:], atol=1e-4)
    with pytest.raises(ValueError, match="ends at token 25"):
        model(ids_BT[:, 24:], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_padding_has_no_position():
    """Catches columns taken for tokens, in the prompt and in steps."""
    model = small_model()
    inputs = left_padded(random_tokens(1, 9), random_tokens(1, 4))
    wide = {name: torch.nn.functional.pad(rows, (20, 0)) for name, rows in inputs.items()}
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 9:]
    cache, mask_BT = model.make_cache(), wide["attention_mask"]
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    step = model(**wide, position_ids=position_BT, past_key_values=cache, use_cache=True)
    for column in range(8):
        best_B1 = step.logits[:, -1:].argmax(-1)
        assert torch.equal(best_B1[:, 0], expected[:, column])
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        position_B1 = mask_BT.sum(1, keepdim=True) - 1
        step = model(
            best_B1,
            attention_mask=mask_BT,
            position_ids=position_B1,
            past_key_values=cache,
            use_cache=True,
        )


@torch.no_grad()
def test_generate_refuses_at_its_start():
    """Catches a run that breaks off at the limit with all it has generated, and a limit one too low."""
    model, ids_BT = small_model(), random_tokens(1, 20)
    with pytest.raises(ValueError, match=r"come to 26 tokens .* has 24 positions"):
        model.generate(ids_BT, max_new_tokens=6)
    assert model.last_kv_stats is None
    assert model.generate(ids_BT, max_new_tokens=5, min_new_tokens=5).shape == (1, 25)


@torch.no_grad()
def test_chunks_of_a_padded_batch_in_transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 gives the tokens of such chunks wrong positions. Catches: wrong logits in silence;
    chunks refused where nothing is wrong with them."""
    model, inputs = tiny_model(), left_padded(random_tokens(1, 9), random_tokens(1, 4))
    chunks = {"prefill_chunk_size": 4, "max_new_tokens": 1}
    monkeypatch.setattr(refusals_dms, "__version__", "4.57.6")
    with pytest.raises(ValueError, match="prefill_chunk_size with a padded batch"):
        model.generate(**inputs, **chunks)
    model.generate(**inputs, max_new_tokens=1)
    model.generate(inputs["input_ids"], attention_mask=torch.ones(2, 9, dtype=torch.int64), **chunks)
    if int(transformers.__version__.split(".")[0]) >= 5:
        monkeypatch.setattr(refusals_dms, "__version__", transformers.__version__)
        model.generate(**inputs, **chunks)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 48),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 1.25, "original_max_position_embeddings": 16}, 24),
        ({"rope_type": "dynamic", "factor": 2.0}, 24),
    ],
    ids=lambda value: str(value.get("rope_type")) if isinstance(value, dict) else str(value),
)
def test_scaled_rope_has_more_positions(scaling, positions):
    """Catches max_position_embeddings taken for the limit where scaling extends it."""
    assert small_model(rope_scaling={"rope_theta": 10000.0} | scaling).max_positions == positions


@torch.no_grad()
def test_a_cache_of_other_sizes():
    """Catches a failure in the first layer, after which the cache could no longer be used."""
    model, ids_BT = tiny_model("llama"), random_tokens(2, 9)
    other = tiny_model("llama", num_key_value_heads=1)
    cache = other.make_cache()
    feed(other, cache, ids_BT[:, :5], [5])
    with pytest.raises(ValueError, match="KV heads, head size"):
        model(ids_BT[:, 5:], past_key_values=cache, use_cache=True)
    rest = feed(other, cache, ids_BT[:, 5:], [4])
    assert torch.allclose(rest, other(ids_BT, use_cache=False).logits[:, 5:], atol=1e-4)


@torch.no_grad()
def test_positions_count_embeddings_and_no_padding():
    """Catches: a prompt of embeddings left out of the length (a generation that breaks off), and columns of
    padding counted (one that is refused for nothing)."""
    model = small_model()
    embeddings = model.get_input_embeddings()(random_tokens(1, 20))
    with pytest.raises(ValueError, match="has 24 positions"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=6)
    assert model.last_kv_stats is None
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=5, min_new_tokens=5).shape == (1, 5)
    inputs = left_padded(random_tokens(1, 9), random_tokens(1, 4))
    wide = {name: torch.nn.functional.pad(rows, (20, 0)) for name, rows in inputs.items()}
    model.generate(**wide, max_new_tokens=8)
    with pytest.raises(ValueError, match="come to 26 tokens"):
        model.generate(**wide, max_new_tokens=17)


def ended_batch(model, ids_BT):
    """Return a cache after a batch of which the second sequence ended first, and the batch's output."""
    free = model.generate(ids_BT, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    end = int(free[1, ids_BT.shape[1] + 2])
    assert end not in free[0, ids_BT.shape[1] :]
    cache = model.make_cache()
    settings = {"eos_token_id": end, "pad_token_id": 0, "do_sample": False}
    return cache, model.generate(ids_BT, past_key_values=cache, max_new_tokens=8, **settings)


@torch.no_grad()
def test_a_batch_of_which_one_had_ended_is_not_continued():
    """The batch goes on in one step or many, whatever the mask says. Catches: answers that have padding in
    their past."""
    model = tiny_model()
    cache, text = ended_batch(model, random_tokens(2, 9))
    more = torch.cat([text, random_tokens(2, 3)], dim=1)
    for continued in (text, more):
        for mask in (None, torch.ones_like(continued)):
            with pytest.raises(ValueError, match="had ended before the others"):
                model.generate(continued, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.int64)
    mask[1, -3] = 0
    with pytest.raises(ValueError, match="hides tokens that the cache has taken in"):
        model(random_tokens(2, 1), attention_mask=mask, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_beams_are_not_continued():
    """Catches: a second turn on rows that are the search's, not those of its output."""
    model, ids_BT = tiny_model(), random_tokens(1, 9)
    cache = model.make_cache()
    beams = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 6}
    text = model.generate(ids_BT, past_key_values=cache, **beams)
    with pytest.raises(ValueError, match="holds the beams that a beam search was following"):
        model.generate(text, past_key_values=cache, max_new_tokens=2)
    cache.reset()
    model.generate(text, past_key_values=cache, max_new_tokens=2)
    kept, several = model.make_cache(), {"num_return_sequences": 2, "do_sample": True}
    text = model.generate(ids_BT, past_key_values=kept, max_new_tokens=6, min_new_tokens=6, **several)
    model.generate(text, attention_mask=torch.ones_like(text), past_key_values=kept, max_new_tokens=2)


@torch.no_grad()
def test_a_text_must_go_beyond_its_cache():
    """Catches: a prompt that is fed twice in silence, and a cache beside use_cache=False."""
    model, ids_BT = tiny_model(), random_tokens(1, 9)
    cache = model.make_cache()
    text = model.generate(ids_BT, past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
    for again in (ids_BT, text[:, :-1]):
        with pytest.raises(ValueError, match=f"has {again.shape[1]} tokens, the DMS cache has had 14"):
            model.generate(again, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache=False with a cache"):
        model.generate(text, past_key_values=cache, use_cache=False, max_new_tokens=2)
    model.generate(text, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2]])


@torch.no_grad()
def test_what_does_not_fit_is_called_by_its_name():
    """Catches: another batch size told as a hidden mask or a broadcast, an empty input as a reshape."""
    model, ids_BT = small_model(), random_tokens(2, 22)
    cache = model.make_cache()
    feed(model, cache, ids_BT, [22])
    for tokens, mask in ((2, torch.ones(3, 24)), (3, None)):
        with pytest.raises(ValueError, match="holds 2 sequences, the input has 3"):
            model(random_tokens(3, tokens), attention_mask=mask, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="no tokens"):
        model(ids_BT[:, :0], past_key_values=cache, use_cache=True)
    feed(model, cache, random_tokens(2, 2), [1])


@torch.no_grad()
def test_a_generation_within_a_generation():
    """Another thread's generation could come in between like this. Catches: state of one call kept on the
    model."""
    model, ids_BT = tiny_model(), random_tokens(2, 9)
    model.generate(ids_BT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = model.last_kv_stats

    class Inner(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[0] == 2:
                model.generate(random_tokens(3, 4), max_new_tokens=2)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model.generate(ids_BT, max_new_tokens=6, min_new_tokens=6, do_sample=False, stopping_criteria=[Inner()])
    assert model.last_kv_stats == expected


@torch.inference_mode()
def test_a_copy_made_in_inference_mode_goes_on_outside():
    """Catches: a copy of inference tensors, which nothing outside may change."""
    model, ids_BT = tiny_model(), random_tokens(1, 12)
    cache = model.make_cache()
    feed(model, cache, ids_BT[:, :9], [9])
    copied = copy.deepcopy(cache)
    expected = feed(model, cache, ids_BT[:, 9:], [1])
    with torch.inference_mode(False), torch.no_grad():
        found = feed(model, copied, ids_BT[:, 9:].clone(), [1])
    assert torch.equal(found, expected)


def test_eviction_switched_off_is_said():
    """Catches a model that keeps every pair in silence, and a warning for the first such model only."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("megatron_dms.hf.modeling_dms")
    logger.addHandler(handler)
    try:
        for disable in (False, True, True):
            tiny_model(dms_disable_eviction=disable)
    finally:
        logger.removeHandler(handler)
    assert len(records) == 2
    assert "keeps every pair" in records[0]
