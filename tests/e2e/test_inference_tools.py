"""An exported model inside the tools that people use: lm-evaluation-harness, pipeline, streaming."""

import io
import itertools
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "tiny_reasoner" / "base"
NEW = 24
DMS = {
    **{"predictor": "query_channel", "granularity": "head", "alpha_scale": 100.0, "alpha_offset": 5.0},
    **{"window": 4, "lag": 1, "temperature": 0.1},
}
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
GENERATE = """task: local_generate
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["<never>"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""
CHOOSE = """task: local_choose
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny reasoner's base as a DMS model. It evicts, because its query channel was never
    trained."""
    from megatron_dms.conversion import export_hf, import_hf
    from tests.support.checkpoint_edits import rewrite

    folder = tmp_path_factory.mktemp("tools")
    import_hf(BASE, folder / "megatron")
    rewrite(folder / "megatron", {}, {"dms": DMS}, iteration=1)
    export_hf(folder / "megatron", folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def loaded(exported: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    return model, AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


def problems(count: int) -> list[dict]:
    from problems import generate

    items = itertools.islice(generate("heldout", 3), count)
    return [
        {
            "question": next(turn["content"] for turn in item["messages"] if turn["role"] == "user"),
            "answer": item["answer"],
            "choices": [str(digit) for digit in range(10)],
            "label": int(item["answer"]),
        }
        for item in items
    ]


def generated(loaded: tuple, prompt: str) -> str:
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert model.last_kv_stats.achieved_cr > 1.1, "nothing was evicted: a dense model would do"
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def log_likelihood(loaded: tuple, prompt: str, continuation: str) -> float:
    model, tokenizer = loaded
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + continuation, return_tensors="pt").input_ids
    logs = model(ids[:, :-1]).logits[0].log_softmax(-1)
    return float(logs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum())


def test_lm_evaluation_harness(exported: Path, loaded: tuple, tmp_path: Path) -> None:
    """The harness runs generation and log-likelihood tasks from local files, in padded batches. Catches: an
    export that the harness cannot drive, or that gives it other answers."""
    docs, tasks = problems(5), tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "problems.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (tasks / f"{name}.yaml").write_text(text + COMMON.format(data=tasks / "problems.jsonl"))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "3"),
        *("--model_args", f"pretrained={exported},trust_remote_code=true"),
        *("--tasks", "local_generate,local_choose", "--include_path", str(tasks)),
        *("--output_path", str(tmp_path / "results"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for name in ("generate", "choose"):
        (file,) = tmp_path.glob(f"results/**/samples_local_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(samples[name]) == len(docs)
    for sample in samples["generate"]:
        assert sample["resps"] == [[generated(loaded, sample["doc"]["question"])]]
    for sample in samples["choose"]:
        found = [float(response[0][0]) for response in sample["resps"]]
        question = sample["doc"]["question"]
        expected = [log_likelihood(loaded, question, f" {choice}") for choice in sample["doc"]["choices"]]
        assert found == pytest.approx(expected, abs=1e-3)


def without_blanks(text: str) -> str:
    """Remove blanks: a pipeline, a streamer and `decode` set them differently, and so does transformers
    4.57 before "?"."""
    return "".join(text.split())


def test_pipeline_and_streaming(exported: Path, loaded: tuple) -> None:
    """Catches: a class that `pipeline` does not take, and a streamer that is given other tokens."""
    from transformers import TextStreamer, pipeline

    model, tokenizer = loaded
    prompt = problems(1)[0]["question"]
    expected = generated(loaded, prompt)
    generator = pipeline("text-generation", model=str(exported), trust_remote_code=True, device="cpu")
    (answer,) = generator(prompt, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert without_blanks(answer["generated_text"]) == without_blanks(expected)
    shown = io.StringIO()
    with redirect_stdout(shown):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert without_blanks(shown.getvalue()) == without_blanks(expected)
