"""`evaluate cost`: figures equal to counting by hand, whatever the batches; and every bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_dms.evaluation.generation_cost import (
    PER_HEAD,
    Generation,
    cost_table,
    measure,
    per_head,
    rows_as_json,
    totals,
)
from megatron_dms.inference.prompts import Prompt
from tests.support.dms_by_definition import held_pairs, reference
from tests.support.exported_models import BASE, export_with_tokenizer
from tests.support.generation_by_hand import greedy_by_hand
from tests.support.tiny_dms_models import KV_HEADS, LAYERS, random_tokens, tiny_model
from tests.support.tools import Done, run_tool

NEW = 15
LENGTHS = (13, 6, 9)
GREEDY = Generation(max_new_tokens=NEW)
SUMS = ("prompt_tokens", "generated_tokens", "kv_reads", "dense_kv_reads")
ENTRIES = [
    {"prompt": "k = 0 ; l = 3 ; what is l ?"},
    {"messages": [{"role": "user", "content": "m = 4 ; n = m * m ; what is n ?"}], "id": 7},
]


def ask(model, generation: Generation = GREEDY) -> list:
    prompts = [(line, random_tokens(1, n, seed=n)[0].tolist()) for line, n in enumerate(LENGTHS, 1)]
    return measure(model, prompts, generation, 0, lambda line: None)


class ByHand:
    """One greedy answer, counted from the definition: a masked forward in fp64 and loops over pairs."""

    def __init__(self, model, ids: list[int], new: int = NEW) -> None:
        text = greedy_by_hand(model, torch.tensor([ids]), new)[0]
        eos = model.generation_config.eos_token_id
        answer = text[len(ids) :].tolist()
        self.generated = answer.index(eos) + 1 if eos in answer else new
        self.seen = len(ids) + self.generated - 1
        window, lag = model.dms_settings.window, model.dms_settings.lag
        decision = reference(model, text[: self.seen]).decision
        held = [
            [[held_pairs(head, n, window, lag) for head in layer] for layer in decision.tolist()]
            for n in range(len(ids), self.seen + 1)
        ]
        held = torch.tensor(held).double()  # [generated, L, G]
        self.reads_LG, self.peak_LG = held.sum(dim=0), held.amax(dim=0)
        self.peak = held.mean(dim=(1, 2)).max().item()
        self.evicted_LG, self.decided = decision[:, :, lag:].sum(dim=2), self.seen - lag
        self.dense_reads = sum(range(len(ids), len(ids) + self.generated))


def by_hand(model) -> list[ByHand]:
    return [ByHand(model, random_tokens(1, n, seed=n)[0].tolist()) for n in LENGTHS]


def that_ends(lag: int = 1):
    """Return a model whose second answer ends early."""
    model = tiny_model(lag=lag)
    answer = greedy_by_hand(model, random_tokens(1, LENGTHS[1], seed=LENGTHS[1]), NEW)[
        0, LENGTHS[1] :
    ].tolist()
    model.generation_config.eos_token_id = next(
        token for i, token in enumerate(answer) if i > 3 and token not in answer[:i]
    )
    return model


@pytest.mark.parametrize("lag", [0, 1, 3])
@torch.no_grad()
def test_rows_and_totals_are_those_of_counting_by_hand(lag: int) -> None:
    """Catches: decisions weighted by tokens instead of decided pairs, means where sums are said, a dense
    figure of the DMS cache, a peak summed over prompts, rows in another order."""
    model = that_ends(lag)
    expected, batches = by_hand(model), ask(model)
    rows = rows_as_json(batches)
    assert [row["line"] for row in rows] == [1, 2, 3]
    for row, hand, length in zip(rows, expected, LENGTHS, strict=True):
        assert row["prompt_tokens"] == length and row["generated_tokens"] == hand.generated
        assert row["kv_reads"] == pytest.approx(hand.reads_LG.mean().item())
        assert row["dense_kv_reads"] == hand.dense_reads
        assert row["peak_tokens"] == pytest.approx(hand.peak) and row["dense_peak_tokens"] == hand.seen
        fraction = hand.evicted_LG.double().mean().item() / hand.decided
        assert row["achieved_cr"] == pytest.approx(1 / (1 - fraction)) and row["achieved_cr"] > 1.5
    assert expected[1].generated < NEW, "the test is to have an answer that ends early"
    found = totals(batches)
    evicted = sum(hand.evicted_LG.double().mean().item() for hand in expected)
    assert found["evicted_fraction"] == pytest.approx(evicted / sum(hand.decided for hand in expected))
    assert found["achieved_cr"] == pytest.approx(1 / (1 - found["evicted_fraction"]))
    for name in SUMS:
        assert found[name] == pytest.approx(sum(row[name] for row in rows))
    for name in ("peak_tokens", "dense_peak_tokens", "peak_bytes", "dense_bytes"):
        assert found[name] == max(row[name] for row in rows)
    bytes_per_pair = 2 * 16 * 4
    assert found["dense_bytes"] == bytes_per_pair * LAYERS * KV_HEADS * found["dense_peak_tokens"]


@pytest.mark.parametrize("batch_size", [2, 3])
@torch.no_grad()
def test_batches_change_no_figure_but_bytes(batch_size: int) -> None:
    """Catches: padding on the wrong side or counted, batches weighted alike whatever is in them, the CR of a
    batch given as that of each of its prompts."""
    model = that_ends()
    alone, together = ask(model), ask(model, Generation(NEW, batch_size=batch_size))
    expected, found = totals(alone), totals(together)
    for name in (*SUMS, "prompts", "evicted_fraction", "achieved_cr", "peak_tokens", "dense_peak_tokens"):
        assert found[name] == pytest.approx(expected[name]), name
    for row, single in zip(rows_as_json(together), rows_as_json(alone), strict=True):
        shared = row["line"] <= 2 or batch_size == 3
        for name, value in single.items():
            unknown = shared and name in ("evicted_fraction", "achieved_cr", "peak_bytes", "dense_bytes")
            assert row[name] == (None if unknown else pytest.approx(value)), name
    assert cost_table(rows_as_json(together), found).count(" -") == 3 * batch_size


@torch.no_grad()
def test_chains_add_up() -> None:
    """Sampling from the best token only is greedy, so a chain is known. Catches: chains of one prompt given
    to the next, a mean over chains, --top-p or --temperature not passed on, the seed not set."""
    model = that_ends()
    chains = Generation(NEW, chains=3, batch_size=2, top_p=1e-6)
    expected, found = rows_as_json(ask(model)), rows_as_json(ask(model, chains))
    for row, single in zip(found, expected, strict=True):
        assert row["prompt_tokens"] == single["prompt_tokens"]
        for name in ("generated_tokens", "kv_reads", "dense_kv_reads", "peak_tokens", "dense_peak_tokens"):
            assert row[name] == pytest.approx(3 * single[name]), name
    assert totals(ask(model, chains))["achieved_cr"] == pytest.approx(totals(ask(model))["achieved_cr"])
    cold = Generation(NEW, chains=3, temperature=1e-6)
    assert rows_as_json(ask(model, cold))[0]["kv_reads"] == pytest.approx(found[0]["kv_reads"])
    hot = [Generation(NEW, chains=3, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    one, again, other = (totals(ask(model, generation))["kv_reads"] for generation in hot)
    assert one == again != other


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_per_head_tables(batch_size: int) -> None:
    """Catches: layers and heads exchanged, a CR of means of ratios, reads of one batch, batches of different
    sizes weighted alike."""
    model = that_ends()
    expected = by_hand(model)
    found = {
        name: torch.tensor(x).double()
        for name, x in per_head(ask(model, Generation(NEW, batch_size=batch_size))).items()
    }
    fraction_LG = sum(hand.evicted_LG for hand in expected) / sum(hand.decided for hand in expected)
    torch.testing.assert_close(found["achieved_cr"], 1 / (1 - fraction_LG.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["kv_reads"], sum(hand.reads_LG for hand in expected))
    torch.testing.assert_close(found["peak_tokens"], sum(hand.peak_LG for hand in expected) / 3)
    assert found["kv_reads"].mean().item() == pytest.approx(totals(ask(model))["kv_reads"])


@torch.no_grad()
def test_settings_of_the_checkpoint_change_nothing() -> None:
    """Catches: a repetition penalty under the name of greedy, and figures of 0 without a cache."""
    model = that_ends()
    expected = rows_as_json(ask(model))
    for name, value in {"use_cache": False, "repetition_penalty": 3.0, "guidance_scale": 2.0}.items():
        setattr(model.generation_config, name, value)
    assert rows_as_json(ask(model)) == expected


@torch.no_grad()
def test_figures_that_an_old_export_lacks() -> None:
    """Catches: a KeyError after the last prompt instead of a line after the first."""
    with pytest.raises(ValueError, match="lacks no_such_figure: export it again"):
        measure(tiny_model(), [(1, [3, 4])], GREEDY, 0, print, needed=[PER_HEAD[0], "no_such_figure"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_with_tokenizer(tmp_path_factory.mktemp("evaluate") / "evaluated_model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, ENTRIES)) + "\n")
    return file


def run(model: Path, prompts: Path, *options: object, cwd: Path) -> Done:
    return run_tool(
        "evaluate", "cost", "--model", model, "--prompts", prompts, "--device", "cpu", *options, cwd=cwd
    )


def test_command_line(exported: Path, prompts: Path, tmp_path: Path) -> None:
    """Catches: a chat without its template or without the start of the answer, lines counted without the
    blank ones, JSON that differs from the table, no file or half of one."""
    out = tmp_path / "cost.json"
    done = run(exported, prompts, "--max-new-tokens", NEW, "--per-head", "--json", out, cwd=tmp_path)
    assert done.status == 0, done.error
    *table, last = done.out.splitlines()
    line, saved = json.loads(last), json.loads(out.read_text())
    assert saved.items() >= line.items() and set(saved) - set(line) == {"rows", "per_head"}
    assert line["eviction"] is True and "switched off" not in done.out
    assert (line["chains"], line["dtype"], line["device"], line["page_attention"]) == (
        1,
        "float32",
        "cpu",
        "torch",
    )

    from transformers import AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(exported, trust_remote_code=True),
        tiny_model(vocab_size=72),
    )
    chat = f"<s> <|im_start|> user {ENTRIES[1]['messages'][0]['content']} <|im_end|> <|im_start|> assistant"
    chat = tokenizer.bos_token + chat.removeprefix("<s>")
    texts = [
        tokenizer(ENTRIES[0]["prompt"])["input_ids"],
        tokenizer(chat, add_special_tokens=False)["input_ids"],
    ]
    hands = [ByHand(model, ids) for ids in texts]
    assert [row["line"] for row in saved["rows"]] == [1, 3]
    for row, ids, hand in zip(saved["rows"], texts, hands, strict=True):
        assert row["prompt_tokens"] == len(ids)
        assert row["kv_reads"] == pytest.approx(hand.reads_LG.mean().item())
        cells = next(cells for text in table if (cells := text.split()) and cells[0] == str(row["line"]))
        assert cells[1:5] == [str(len(ids)), str(NEW), f"{row['achieved_cr']:.2f}", f"{row['kv_reads']:.1f}"]
    assert line["kv_reads"] == pytest.approx(sum(hand.reads_LG.mean().item() for hand in hands))
    assert len(saved["per_head"]["kv_reads"]) == LAYERS and "head 1" in done.out


def test_eviction_switched_off(exported: Path, prompts: Path, tmp_path: Path) -> None:
    """Catches: CR 1 that looks like the model's own. Also: --temperature that would have no effect."""
    folder = shutil.copytree(exported, tmp_path / "kept")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dms_disable_eviction": True}))
    done = run(folder, prompts, "--max-new-tokens", 9, "--chains", 2, "--seed", 3, cwd=tmp_path)
    assert done.status == 0, done.error
    first, *_, last = done.out.splitlines()
    found = json.loads(last)
    assert first == "eviction is switched off (dms_disable_eviction): every pair is kept, CR 1"
    assert found["eviction"] is False and found["achieved_cr"] == 1 and found["seed"] == 3
    assert found["kv_reads"] == found["dense_kv_reads"] and found["peak_tokens"] == found["dense_peak_tokens"]


def test_a_chat_has_the_special_tokens_of_its_template_only() -> None:
    """Catches: a second BOS before a chat, from tokenizers that put one before every text; a text without."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    before_all = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    tokenizer.backend_tokenizer.post_processor = before_all
    chat, text = (
        Prompt("", 1, ENTRIES[i][key]).encode(tokenizer) for i, key in ((1, "messages"), (0, "prompt"))
    )
    assert chat[0] == text[0] == bos_id and chat.count(bos_id) == text.count(bos_id) == 1


LINES = {
    "no JSON": ('{"prompt": "k = 0"}\n{"prompt": ', "line 2 is not JSON"),
    "no object": ("[1]", "line 1: expected an object with either `prompt` or `messages`"),
    "neither": ('{"text": "k"}', "line 1: expected an object with either"),
    "both": ('{"prompt": "k", "messages": []}', "line 1: expected an object with either"),
    "no text": ('{"prompt": 3}', "line 1: `prompt` is no text"),
    "no messages": ('{"messages": []}', "line 1: `messages` is no list of objects"),
    "no role": ('{"messages": [{"content": "k"}]}', "line 1: `messages` is no list of objects"),
    "answered": ('{"messages": [{"role": "assistant", "content": "k"}]}', "line 1: the last message is"),
    "nothing": ("\n \n", "has no prompts"),
    "0 tokens": ('{"prompt": "k"}\n{"prompt": ""}', "line 2: a prompt of 0 tokens"),
    "not UTF-8": (b"\xff\xfe", "is not UTF-8"),
    "half a character": ('{"prompt": "k \\ud83d"}', "line 1: the tokenizer does not take this text"),
    "too long": (
        json.dumps({"prompt": "k " * 250}),
        "the longest prompt and its answer make 258 tokens",
    ),
}


def refused(done: Done, message: str) -> None:
    assert done.status == 2 and done.out == "", done.out + done.error
    *before, last = done.errors
    assert last.startswith("error: ") and message in last, done.error
    assert all(line.startswith("loading ") for line in before), done.error


@pytest.mark.parametrize("case", LINES)
def test_bad_prompts(case: str, exported: Path, tmp_path: Path) -> None:
    """Catches: a traceback, a line without its number, a prompt that is skipped, an output in spite of it."""
    content, message = LINES[case]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    out.mkdir()
    done = run(exported, file, "--max-new-tokens", 9, "--json", out / "cost.json", cwd=tmp_path)
    refused(done, message)
    assert not list(out.iterdir())


OPTIONS = {
    "0 tokens": (["--max-new-tokens", "0"], "0 is no whole number above 0"),
    "negative": (["--chains", "-2"], "-2 is no whole number above 0"),
    "no number": (["--batch-size", "two"], "two is no whole number above 0"),
    "temperature 0": (["--chains", "2", "--temperature", "0"], "0 is no number above 0"),
    "top-p": (["--chains", "2", "--top-p", "1.5"], "1.5 is above 1"),
    "no effect": (["--seed", "1"], "--seed has no effect on one chain"),
    "device": (["--device", "tpu"], "--device is tpu, torch sees cpu"),
    "triton": (["--device", "cpu", "--page-attention", "triton"], "triton needs a CUDA device"),
    "output folder": (["--json", "no/such/cost.json"], "cannot write no/such/cost.json: No such file"),
    "output exists": (["--json", "prompts.jsonl"], "prompts.jsonl exists"),
    "no prompts": (["--prompts", "no.jsonl"], "no.jsonl"),
    "no model": (["--model", "no_model"], "no_model is not a checkpoint"),
    "no DMS model": (["--model", str(BASE)], "base is not an exported DMS checkpoint: auto_map"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case: str, exported: Path, prompts: Path, tmp_path: Path) -> None:
    """Catches: an option that is taken and ignored, an output that is replaced, a dense model measured."""
    options, message = OPTIONS[case]
    before = prompts.read_bytes()
    refused(run(exported, prompts, *options, cwd=tmp_path), message)
    assert prompts.read_bytes() == before and {file.name for file in tmp_path.iterdir()} <= {
        "prompts.jsonl",
        "modules",
    }


def test_damaged_checkpoints(exported: Path, prompts: Path, tmp_path: Path) -> None:
    """Catches: weights that transformers fills with random values, a chat without template told as a
    traceback, another tokenizer in place of the missing one."""
    from safetensors.torch import load_file, save_file

    for name, damage, message in (
        ("weights", "model.safetensors", "missing keys, among them model.norm.weight"),
        ("cut", "model.safetensors", "its weights cannot be read"),
        ("template", "chat_template.jinja", "line 3: found messages, but the tokenizer has no chat template"),
        ("tokenizer", "tokenizer.json", "has no usable tokenizer"),
        ("shape", "model.safetensors", "cannot be loaded: RuntimeError"),
        ("code", "pages_dms.py", "cannot be loaded: SyntaxError"),
    ):
        folder = shutil.copytree(exported, tmp_path / name)
        file = folder / damage
        if name == "weights":
            tensors = {key: tensor for key, tensor in load_file(file).items() if key != "model.norm.weight"}
            save_file(tensors, file, metadata={"format": "pt"})
        elif name == "shape":
            tensors = load_file(file)
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
            save_file(tensors, file, metadata={"format": "pt"})
        elif name == "code":
            file.write_text("def broken(:\n")
        elif name == "cut":
            file.write_bytes(file.read_bytes()[:5000])
        else:
            file.unlink()
        refused(run(folder, prompts, cwd=tmp_path), message)
