"""Positions and caches that do not fit the model are refused, and the cache stays as it was."""

import logging

import pytest
import torch
import transformers
from test_hf_cache import feed
from test_hf_generate import left_padded
from test_hf_reference import one_thread, random_tokens, tiny_model  # noqa: F401

from megatron_dms.hf import refusals_dms

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
    with pytest.raises(ValueError, match="come to 26 tokens .* has 24 positions"):
        model.generate(ids_BT, max_new_tokens=6)
    assert model.last_kv_stats is None
    assert model.generate(ids_BT, max_new_tokens=5, min_new_tokens=5).shape == (1, 25)


@torch.no_grad()
def test_chunks_of_a_padded_batch_in_transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """There transformers gives the tokens wrong positions. Catches: wrong logits in silence; chunks refused
    where nothing is wrong with them."""
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
