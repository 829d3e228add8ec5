"""Models that merge pairs: the cache against the masked forward and against a cache that is a list of
slots.

The models are random, in fp32, with logits of order 1; the tolerance is 1e-4, as for generation.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dms.conversion import dms_formats
from megatron_dms.errors import CheckpointError
from megatron_dms.hf import MODEL_CLASSES, config_entries, export_files
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.inference import dmc_model
from megatron_dms.ops.merging import merge_pairs
from tests.support.tiny_dms_models import HEAD_SIZE, KV_HEADS, LAYERS, QUERY_HEADS, random_tokens, tiny_config

T, NEW = 21, 12
CLOSE = {"rtol": 0.0, "atol": 1e-4}
SETTINGS = {"alpha_scale": 1.0, "alpha_offset": 0.0, "temperature": 0.1, "target_cr": 4.0, "window": 0}
SETTINGS |= {"predictor": "key_channel", "granularity": "head", "lag": 1, "method": "merge"}
SETTINGS |= {"importance_scale": 1.5, "importance_offset": 0.2}


def merging_model(family: str = "qwen3"):
    """Return a model with a true mixture of decisions and importances."""
    torch.manual_seed(0)
    entries = config_entries(family, DMSSettings(**SETTINGS))
    model = dmc_model.merging_class(family)(tiny_config(family, **entries)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def exported(folder: Path) -> Path:
    """Write a model as `convert export` writes it, without the tokenizer."""
    merging_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | config_entries("qwen3", DMSSettings(**SETTINGS))))
    for file in export_files():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class ListOfSlots:
    """Stands where one attention layer stores and attends: for each head, a list of [z, key, value]."""

    def __init__(self) -> None:
        self.slots = [[[] for _ in range(KV_HEADS)] for _ in range(2)]

    def __call__(self, q, k, v, decided, new, meter, cache):
        out = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for h in range(QUERY_HEADS):
                g = h // (QUERY_HEADS // KV_HEADS)
                slots = self.slots[b][g]
                for t in range(q.shape[2]):
                    if h % (QUERY_HEADS // KV_HEADS) == 0:
                        omega = decided.log_importance[b, g, t].double().exp()
                        if slots and decided.merge[b, g, t]:
                            z, key, value = slots[-1]
                            whole = z + omega
                            key = (z * key + omega * k[b, g, t]) / whole
                            slots[-1] = (whole, key, (z * value + omega * v[b, g, t]) / whole)
                        else:
                            slots.append((omega, k[b, g, t].double(), v[b, g, t].double()))
                    keys, values = (torch.stack([slot[i] for slot in slots]) for i in (1, 2))
                    weights = (keys @ q[b, h, t].double() * HEAD_SIZE**-0.5).softmax(0)
                    out[b, h, t] = (weights @ values).to(q.dtype)
        return out

    def count(self) -> list[list[int]]:
        return [[len(head) for head in heads] for heads in self.slots]


@pytest.mark.parametrize("family", MODEL_CLASSES)
@torch.no_grad()
def test_cache_equals_forward_equals_lists_of_slots(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeds the tokens one by one, in chunks and all at once, with and without a cache; then compares slot
    counts. Catches: the running mean lost or rounded between forwards, a merged pair that opens a slot, a
    slot overwritten that was to stay, a channel that is not zeroed, the first token merged into nothing."""
    model, ids = merging_model(family), random_tokens(2, T)
    whole = model(ids, use_cache=False).logits
    cr_of_forward = model.last_kv_stats.achieved_cr
    found = {}
    for sizes in ((1,) * T, (T,), (5, 1, 1, 9, 1, 4)):
        cache = model.make_cache()
        parts = ids.split(sizes, dim=1)
        found[sizes] = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
        torch.testing.assert_close(found[sizes], whole, **CLOSE)
    held = torch.stack([layer.held_BG for layer in cache.layers])
    stats = model.last_kv_stats

    references = [ListOfSlots() for _ in range(LAYERS)]
    for layer, slots in zip(model.model.layers, references, strict=True):
        monkeypatch.setattr(layer.self_attn, "merge_and_attend", slots)
    for t in range(T):
        step = model(ids[:, t : t + 1], position_ids=torch.full((2, 1), t), use_cache=False).logits
        torch.testing.assert_close(step[:, 0], whole[:, t], **CLOSE)
    assert held.tolist() == [slots.count() for slots in references]
    assert stats.achieved_cr == pytest.approx(T / held.double().mean()) == pytest.approx(cr_of_forward)
    assert stats.peak_tokens_mean == pytest.approx(held.double().mean())
    assert 1.3 < stats.achieved_cr < 4, "hardly a mixture"


@torch.no_grad()
def test_generation_padded_sampled_and_reused() -> None:
    """Rows of a left-padded batch, several answers to one prompt, and a second turn on a cache give what
    each gives alone. Catches: padding with a weight in the mean, a running mean that stays behind when a
    batch splits, one left over by reset()."""
    model = merging_model()
    prompts, options = (random_tokens(1, 9), random_tokens(1, 5, seed=3)), {"max_new_tokens": NEW}
    alone = [model.generate(ids, do_sample=False, **options)[0, -NEW:] for ids in prompts]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompts[1]], dim=1)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    both = {"input_ids": torch.cat([prompts[0], padded]), "attention_mask": mask}
    found = model.generate(**both, do_sample=False, **options)
    assert [row.tolist() for row in found[:, -NEW:]] == [row.tolist() for row in alone]
    reads = model.last_kv_stats.kv_reads
    model.generate(prompts[1], do_sample=False, **options)
    assert model.last_kv_stats.kv_reads == pytest.approx(reads[1:])

    torch.manual_seed(1)
    samples = model.generate(
        prompts[0], do_sample=True, num_return_sequences=3, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert len({tuple(row.tolist()) for row in samples.sequences}) > 1
    expected = model(samples.sequences, use_cache=False).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(samples.logits, dim=1), expected, **CLOSE)

    cache = model.make_cache()
    for _ in range(2):
        once = model.generate(prompts[0], past_key_values=cache, do_sample=False, **options)
        assert torch.equal(once[0, -NEW:], alone[0])
        longer = torch.cat([once, random_tokens(1, 4, seed=5)], dim=1)
        turn = model.generate(longer, past_key_values=cache, do_sample=False, **options)
        assert torch.equal(turn, model.generate(longer, do_sample=False, **options))
        cache.reset()
    assert torch.equal(model.generate(**both, past_key_values=cache, do_sample=False, **options), found)


@torch.no_grad()
def test_padding_between_tokens() -> None:
    """Feeds a chunk whose second row ends in padding, and one more chunk. Catches: padding that opens a
    slot, or has a weight in the mean that the next token goes on from."""
    model, ids, alone = merging_model(), random_tokens(2, 16), random_tokens(2, 16)[1:]
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 5:8] = 0
    positions = mask.cumsum(1) - 1
    expected = model(torch.cat([alone[:, :5], alone[:, 8:]], dim=1), use_cache=False).logits[0, 5:]
    cache = model.make_cache()
    model(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], past_key_values=cache)
    rest = {"attention_mask": mask, "position_ids": positions[:, 8:]}
    torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache, **rest).logits[1], expected, **CLOSE)


@torch.no_grad()
def test_running_mean_is_kept_in_fp32() -> None:
    """400 pairs of weight 1 share one slot, with bfloat16 keys: 1/400 of the last is below bfloat16's
    step. Catches: accumulating in the type of the cache, with which a mean stops moving."""
    keys = torch.linspace(0.5, 1.5, 400)[None, None, :, None].bfloat16()
    decided = torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1)
    running = None
    for t in range(400):
        new = dmc_model.NewTokens.place(torch.tensor([t]), 1, None)
        key = keys[:, :, t : t + 1]
        found, _, running = dmc_model.accumulate(key, key, dmc_model.MergeDecisions(*decided), new, running)
    alpha, log_importance = torch.ones(1, 1, 400), torch.zeros(1, 1, 400)
    expected, _ = merge_pairs(keys, keys, alpha, log_importance)
    assert found.dtype == torch.bfloat16 and found.item() == expected[..., -1, :].item()
    assert running.k_BG1D.item() == pytest.approx(keys.float().mean().item(), abs=1e-5)


def test_what_an_export_is_loaded_by(tmp_path: Path) -> None:
    """Catches: a merged model that runs as one that evicts, or the other way round; weights not loaded."""
    folder = exported(tmp_path / "merging")
    with pytest.raises(ValueError, match=r"dms_method .* 'merge'.*megatron_dms.inference.dmc_model.load_dmc"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model, ids = dmc_model.load_dmc(folder, "float32", "cpu"), random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, merging_model()(ids).logits)
    with pytest.raises(NotImplementedError, match="CUDA graph"):
        model.graphed_step(model.make_cache())
    config = json.loads((folder / "config.json").read_text())
    evicts = {key: value for key, value in config.items() if key != "dms_method"}
    (folder / "config.json").write_text(json.dumps(evicts))
    with pytest.raises(ValueError, match="'evict', expected 'merge'"):
        dmc_model.load_dmc(folder, "float32", "cpu")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        dmc_model.load_dmc(tmp_path / "none", "float32", "cpu")
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        dmc_model.merging_class("gpt2")


@pytest.mark.parametrize(
    "change",
    [{"predictor": "linear"}, {"granularity": "layer"}, {"window": 2}, {"lag": 0}, {"method": "pool"}]
    + [{"importance_scale": 0.0}, {"importance_offset": float("nan")}],
)
def test_settings_are_checked(change: dict) -> None:
    """Catches: a config.json of which a key would be ignored."""
    with pytest.raises(ValueError, match=r"dms_method|dms_importance"):
        config_entries("qwen3", DMSSettings(**SETTINGS | change))


def test_formats() -> None:
    """Settings go into config.json and come back; formats that know no merging refuse them. Catches:
    settings lost, an evicting model's config.json that says more than before."""
    settings = DMSSettings(**SETTINGS)
    assert DMSSettings.from_entries(settings.to_entries()) == settings
    read = dms_formats.read(settings.to_entries(), None)
    assert read.fields == {key: value for key, value in SETTINGS.items() if key != "target_cr"}
    stored = dms_formats.stored({**read.fields, "train": "all"}, 4.0, "megatron_dms")
    assert stored == read
    for other in ("nvidia", "fastdms"):
        with pytest.raises(CheckpointError, match=f"{other} knows no merging"):
            dms_formats.write_config({}, None, dms_formats.stored(read.fields, 4.0, other), None)
    assert not any(
        "method" in key or "importance" in key
        for key in DMSSettings(predictor="linear", window=3).to_entries()
    )
