"""The training-free baselines against a second implementation, against each other, and against
transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dms.hf import MODEL_CLASSES, pages_dms
from megatron_dms.inference.baselines import METHODS, load_plain, make_policy
from tests.support.baseline_cases import (
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    budget,
    left_padded,
    random_tokens,
    reference,
    save_plain,
)

SPARSE = [name for name in METHODS if name != "vanilla"]
PROMPT, NEW = 21, 30
GREEDY = {"do_sample": False, "use_cache": True, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    return {family: save_plain(root / family, family) for family in MODEL_CLASSES}


@pytest.fixture
def model(folders):
    return load_plain(folders["qwen3"], "float64", "cpu")


def generate(model, method, cr, new=NEW, **inputs):
    """Generate greedily; return the sequences, the logits [B, new, vocab] and the statistics."""
    model.policy = make_policy(method, cr)
    options = GREEDY | {"max_new_tokens": new, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**(options | inputs))
    return out.sequences, torch.stack(out.logits, dim=1), model.last_kv_stats


def check_against_reference(model, method, cr, prompt, new, sequence, logits, stats, row=0):
    """Compare `sequence` [prompt + new], generated greedily with `logits` [new, vocab], with the
    reference."""
    expected = reference(model, sequence[:-1], prompt, new, method, cr)
    assert expected.margin > 1e-4, "a tie: the seed is a bad one"
    torch.testing.assert_close(logits.double(), expected.logits[prompt - 1 :], rtol=1e-4, atol=1e-4)
    reads = expected.reads[:, :, prompt - 1 :].double()
    assert stats.kv_reads[row] == pytest.approx(reads.sum(dim=2).mean().item())
    return reads.sum(dim=2)


@pytest.mark.parametrize("page_slots", [4, 64])
@pytest.mark.parametrize("cr", [2.0, 3.0, 8.0])
@pytest.mark.parametrize("method", SPARSE)
def test_logits_and_reads_are_the_references(model, monkeypatch, method, cr, page_slots):
    """Catches any pair dropped, kept or read that should not be, a wrong score, the latest token not safe
    from H2O, the wrong GQA group, pages of the pool mixed up, and reads counted at another moment."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", page_slots)
    ids_BT = random_tokens(1, PROMPT)
    sequences, logits, stats = generate(model, method, cr, input_ids=ids_BT)
    reads_LG = check_against_reference(model, method, cr, PROMPT, NEW, sequences[0], logits[0], stats)
    assert torch.allclose(torch.tensor(stats.kv_reads_per_head).double(), reads_LG)
    assert stats.kv_reads_mean < 0.97 * stats.dense_kv_reads_mean, "nothing was saved: vanilla would pass"


@pytest.mark.parametrize("family", MODEL_CLASSES)
@pytest.mark.parametrize("method", SPARSE)
def test_every_family(folders, family, method):
    """Catches a family whose biases or norms go another way."""
    model = load_plain(folders[family], "float64", "cpu")
    sequences, logits, stats = generate(model, method, 2.5, 12, input_ids=random_tokens(1, 17, seed=5))
    check_against_reference(model, method, 2.5, 17, 12, sequences[0], logits[0], stats)


@pytest.mark.parametrize("method", SPARSE)
def test_short_prompts(model, method):
    """Runs a prompt below the budget (held grows first), a prompt of one token, and the least budget of
    all, 1."""
    for prompt, new, cr in ((5, 20, 2.0), (1, 25, 3.0), (9, 6, 15.0)):
        sequences, logits, stats = generate(
            model, method, cr, new, input_ids=random_tokens(1, prompt, seed=8)
        )
        check_against_reference(model, method, cr, prompt, new, sequences[0], logits[0], stats)
        if method != "quest":
            assert stats.peak_tokens == [min(prompt + new - 1, budget(prompt + new, cr))]


@pytest.mark.parametrize("method", SPARSE)
def test_padded_batch_is_every_row_alone(model, method):
    """Catches padding that is scored, kept or counted, a budget shared by the batch, and columns taken for
    positions."""
    lengths = (PROMPT, 9, 14)
    cr = 2.5 if method == "quest" else 7.0  # every prompt is cut, to 8, 6 and 7 pairs
    prompts = [random_tokens(1, length, seed=length)[0] for length in lengths]
    batch = left_padded(*prompts)
    sequences, logits, stats = generate(model, method, cr, **batch)
    for row, length in enumerate(lengths):
        text = sequences[row, PROMPT - length :]
        alone, _, alone_stats = generate(model, method, cr, input_ids=prompts[row][None])
        assert torch.equal(text, alone[0])
        check_against_reference(model, method, cr, length, NEW, text, logits[row], stats, row)
        assert stats.peak_tokens[row] == alone_stats.peak_tokens[0]
        assert stats.kv_reads[row] == alone_stats.kv_reads[0]


@pytest.mark.parametrize("method", SPARSE)
def test_chains_of_one_prompt(model, method, monkeypatch):
    """Sampled chains part after the prompt. Catches scores, positions, budgets or summaries that do not
    follow the fork: each chain, read again with its own tokens forced, has the same logits."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 4)
    torch.manual_seed(0)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (PROMPT, 8)]
    cr = 3.0 if method == "quest" else 6.0
    chains = {"num_return_sequences": 3, "do_sample": True, "top_k": 0}
    sequences, logits, stats = generate(model, method, cr, **left_padded(*prompts), **chains)
    assert len({tuple(row) for row in sequences.tolist()}) == 6, "the chains are to differ"
    for row, length in enumerate((PROMPT, PROMPT, PROMPT, 8, 8, 8)):
        text = sequences[row, PROMPT - length :]
        check_against_reference(model, method, cr, length, NEW, text, logits[row], stats, row)


@pytest.mark.parametrize("method", SPARSE)
def test_a_chain_that_ends_early_counts_no_further(model, method):
    """Catches reads, holdings or drops of padding fed to a sequence that has ended."""
    prompts = [random_tokens(1, length, seed=length)[0] for length in (PROMPT, 6)]
    free, _, _ = generate(model, method, 2.0, **left_padded(*prompts))
    new = free[1, PROMPT:].tolist()
    step = next(i for i in range(4, NEW) if new[i] not in new[:i] + free[0, PROMPT:].tolist())
    batch = {"eos_token_id": new[step], **left_padded(*prompts)}
    _, _, stats = generate(model, method, 2.0, **batch)
    assert stats.generated_tokens == [NEW, step + 1]
    expected = reference(model, free[1, PROMPT - 6 : PROMPT + step], 6, NEW, method, 2.0)
    assert stats.kv_reads[1] == pytest.approx(expected.reads[:, :, 5:].sum(dim=2).mean().item())
    if method != "quest":
        held = [min(PROMPT + NEW - 1, budget(PROMPT + NEW, 2.0)), min(6 + step, budget(6 + NEW, 2.0))]
        assert stats.peak_tokens == held
        assert stats.achieved_cr == pytest.approx(sum(stats.tokens_seen) / sum(held))


@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_vanilla_is_the_plain_model(folders, family):
    """Catches a channel zeroed, a predictor left in, or anything else between it and transformers' model."""
    plain = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model = load_plain(folders[family], "float32", "cpu")
    batch = left_padded(random_tokens(1, PROMPT)[0], random_tokens(1, 9, seed=2)[0])
    options = GREEDY | {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    expected = plain.generate(**batch, **options)
    sequences, logits, stats = generate(model, "vanilla", 1.0, **batch)
    assert torch.equal(sequences, expected.sequences)
    torch.testing.assert_close(logits, torch.stack(expected.logits, dim=1), rtol=1e-4, atol=1e-4)
    ids_BT = random_tokens(2, 50, seed=3)
    torch.testing.assert_close(model(ids_BT).logits, plain(ids_BT).logits, rtol=1e-4, atol=1e-4)
    assert stats.achieved_cr == 1.0 and stats.kv_reads == stats.dense_kv_reads
    assert stats.peak_tokens == stats.tokens_seen


@pytest.mark.parametrize("method", SPARSE)
def test_at_ratio_1_every_method_is_vanilla(model, method):
    """Catches a budget one too small, and a first page read without need."""
    batch = left_padded(random_tokens(1, PROMPT)[0], random_tokens(1, 9, seed=2)[0])
    expected, expected_logits, dense = generate(model, "vanilla", 1.0, **batch)
    sequences, logits, stats = generate(model, method, 1.0, **batch)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(logits, expected_logits)
    assert stats.kv_reads == dense.kv_reads and stats.achieved_cr == 1.0
    summaries = [-(-seen // 2) if method == "quest" else 0 for seen in stats.tokens_seen]
    assert stats.peak_tokens == [a + b for a, b in zip(dense.peak_tokens, summaries, strict=True)]


def test_memory_of_quest_is_pairs_and_summaries(model):
    """Catches summaries that are free, and keys and values of the pool taken for all there is."""
    ids_BT = random_tokens(2, PROMPT)
    _, _, stats = generate(model, "quest", 3.0, input_ids=ids_BT)  # pages of 6
    seen = PROMPT + NEW - 1
    assert stats.peak_tokens == [seen + -(-seen // 6)] * 2
    assert stats.achieved_cr == 1.0 and stats.evicted_fraction == 0.0
    heads, pair = LAYERS * 2 * KV_HEADS, HEAD_SIZE * 2 * 8
    _, _, vanilla = generate(model, "vanilla", 1.0, input_ids=ids_BT)
    assert stats.peak_bytes == vanilla.peak_bytes + heads * -(-(PROMPT + NEW) // 6) * pair


@pytest.mark.parametrize("method", ["tova", "h2o", "window"])
def test_what_is_allocated_shrinks(model, monkeypatch, method):
    """Catches dropped pairs that only stop being read."""
    monkeypatch.setattr(pages_dms, "PAGE_SIZE", 4)
    ids_BT = random_tokens(2, 40)
    _, _, stats = generate(model, method, 4.0, 40, input_ids=ids_BT)
    _, _, vanilla = generate(model, "vanilla", 1.0, 40, input_ids=ids_BT)
    assert stats.peak_bytes < 0.4 * vanilla.peak_bytes
    assert stats.achieved_cr == pytest.approx(79 / 20)  # the last of the 80 is never fed


@pytest.mark.parametrize("method", SPARSE)
def test_a_second_call_starts_anew(model, method):
    """Catches scores or counts that outlive their call."""
    ids_BT = random_tokens(2, PROMPT)
    first, logits, stats = generate(model, method, 3.0, input_ids=ids_BT)
    again, logits_again, stats_again = generate(model, method, 3.0, input_ids=ids_BT)
    assert torch.equal(first, again) and torch.equal(logits, logits_again) and stats == stats_again


def test_bfloat16_runs(folders):
    """Catches scores kept in the type of the weights, in which H2O's sums would stand still."""
    model = load_plain(folders["llama"], "bfloat16", "cpu")
    for method in SPARSE:
        _, _, stats = generate(model, method, 3.0, input_ids=random_tokens(2, PROMPT))
        assert stats.generated_tokens == [NEW, NEW]
    model.policy = make_policy("h2o", 3.0)
    cache = model.make_cache(5)
    model(random_tokens(2, PROMPT), past_key_values=cache)
    assert cache.layers[0].score_NC.dtype == torch.float32
