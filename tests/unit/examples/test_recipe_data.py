"""The data of the recipes: OpenR1-Math-220k to JSONL, and R1's chats with their thoughts."""

import json
from pathlib import Path

import pytest

from megatron_dms.data.chat_encoder import DocumentEncoder
from tests.support.tools import ROOT, Done, run_tool

TOKENIZER = ROOT / "examples" / "tiny_reasoner" / "base"
TEMPLATE = (ROOT / "examples" / "r1_with_thoughts.jinja").read_text(encoding="utf-8")
# Not judged: the last answer of the first row, and all of the last row.
ROWS = [
    {"problem": "1 + 1?", "generations": ["<think>\na\n</think>\n\n2", "3", "<think>b", "2", "2"],
     "correctness_math_verify": [True, False, True, True],
     "is_reasoning_complete": [True, True, False, True]},
    {"problem": "2 + 2?", "generations": ["4"],
     "correctness_math_verify": None, "is_reasoning_complete": [True]},
]  # fmt: skip


def convert(folder: Path, rows: list[dict], *words: str) -> Done:
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_tool("examples/openr1.py", "--source", source, *words, cwd=folder)


@pytest.mark.parametrize("text", [False, True])
def test_verified_answers_only(tmp_path: Path, text: bool) -> None:
    """Catches: an answer that is wrong, cut off or was never judged, and one without its thoughts."""
    out = tmp_path / "data" / "openr1.jsonl"
    done = convert(tmp_path, ROWS, "--out", str(out), *["--text"] * text)
    assert done.status == 0, done.error
    assert json.loads(done.out) == {"problems": 2, "answers": 2, "path": str(out)}
    found = [json.loads(line) for line in out.read_text().splitlines()]
    answers = [ROWS[0]["generations"][k] for k in (0, 3)]
    if text:
        assert found == [{"text": f"1 + 1?\n\n{answer}"} for answer in answers]
        return
    user = {"role": "user", "content": "1 + 1?"}
    assert found == [{"messages": [user, {"role": "assistant", "content": answer}]} for answer in answers]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "x", "generations": ["y"]}], "train.jsonl, line 1: column correctness_math_verify"),
        (ROWS[1:], "no verified answer in 1 problems"),
    ],
)
def test_bad_data(tmp_path: Path, rows: list[dict], said: str) -> None:
    """Catches: another data set taken for this one, and an empty file left behind."""
    done = convert(tmp_path, rows, "--out", str(tmp_path / "out.jsonl"))
    assert done.status == 2 and said in done.error and len(done.errors) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_r1_chats_keep_their_thoughts() -> None:
    """Compares with DeepSeek-R1-Distill-Qwen's own template, written out by hand with the thoughts that
    the template drops. Catches: thoughts left out, a target in the user's turn, an answer that does not
    learn to end."""
    encoder = DocumentEncoder(str(TOKENIZER), chat_template=TEMPLATE)
    tokenizer = encoder.tokenizer
    special = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    tokenizer.add_special_tokens(special | {"additional_special_tokens": ["<｜User｜>", "<｜Assistant｜>"]})
    answer = "<think>\nk = 0\n</think>\n\nanswer 8"
    turns = [("user", "what is w ?"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = "<｜begin▁of▁sentence｜><｜User｜>what is w ?<｜Assistant｜>"
    assert rendered == f"{prompt}{answer}<｜end▁of▁sentence｜>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{prompt}<think>\n" and rendered.startswith(asked)

    ids, mask = encoder.encode(json.dumps({"messages": messages}).encode())
    first = list(ids).index(tokenizer.convert_tokens_to_ids("<｜Assistant｜>")) + 1
    assert list(mask) == [0] * first + [1] * (len(ids) - first)
    assert ids[-1] == tokenizer.eos_token_id and len(ids) > first + 3
