"""Preprocessing against token ids and masks written out by hand, on a word-level tokenizer made here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megatron_dms.data import preprocess as preprocessing
from megatron_dms.data.chat_encoder import DocumentEncoder, LineError
from megatron_dms.data.input_files import Line
from megatron_dms.data.line_forms import Chat
from megatron_dms.data.preprocess import PreprocessConfig, Summary, preprocess
from megatron_dms.data.token_files import check_pair
from megatron_dms.errors import DataError
from tests.support.tools import ROOT, run_tool

WORDS = ["<pad>", "<user>", "<assistant>", "<end>", "<think>", "</think>", "a", "b", "c", "d", "tail"]
ID = {word: index for index, word in enumerate(WORDS)}

# Blanks belong to no token of this tokenizer; a tag needs none after it. "tail" stands for what a template
# puts after a turn.
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
    "<end> "
    "{% endgeneration %}{% else %}{{ m.content }} <end> {% endif %}tail {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Writes into the prompt what the turn does not have, as Qwen3's does without thoughts.
PROMPTS_OTHERWISE = PLAIN.replace("<assistant>{% endif %}", "<assistant><think> </think> {% endif %}")
# Keeps the thoughts of the last turn only, as Qwen3's template does.
STRIPS_EARLIER = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRIPS_ALWAYS = STRIPS_EARLIER.replace("{% if loop.last %}", "{% if false %}")

CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "a a"},
]
CHAT_TEXT = "<user> a b <end> tail <assistant> c <end> tail <user> d <end> tail <assistant> a a <end> tail"
CHAT_MASK = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    core = Tokenizer(WordLevel(ID, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<think>"]})
    tokenizer.chat_template = MARKED
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def write_lines(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_assistant_tokens_by_hand(tokenizer_dir: str, template: str) -> None:
    """Markers and prefixes give the same hand-written mask: each answer with its end of turn, nothing else.

    Catches: `end > span_begin` as >=, leaving the tail after <end> in, and transformers' own mask, which runs
    to the end of the conversation because the blank that closes a span belongs to no token.
    """
    tokens, mask = DocumentEncoder(tokenizer_dir, chat_template=template).encode(line(messages=CHAT))
    assert tokens.tolist() == ids(CHAT_TEXT)
    assert mask.tolist() == CHAT_MASK


def test_marked_spans_cover_what_the_public_call_renders(tokenizer_dir: str) -> None:
    """The private renderer gives the text of apply_chat_template, special tokens of the tokenizer included.

    Catches: special_tokens_map not passed on (the template's eos_token would be empty).
    """
    turn = "{{ m.role }}: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    encoder = DocumentEncoder(tokenizer_dir, chat_template="{% for m in messages %}" + turn + "{% endfor %}")
    text = encoder.template.render(Chat(CHAT, [False] * 4)).text
    assert text == encoder.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.count("<end>") == 4


def test_loss_on_all_and_text(tokenizer_dir: str) -> None:
    """Catches: EOS not appended to text, appended twice, or a mask that leaves it out."""
    for template in (MARKED, PROMPTS_OTHERWISE):  # the latter is refused only where spans are asked for
        encoder = DocumentEncoder(tokenizer_dir, loss_on="all", chat_template=template)
        assert encoder.encode(line(messages=CHAT))[1].tolist() == [1] * len(CHAT_MASK)
    for text in ("a b", "a b <end>"):
        tokens, mask = DocumentEncoder(tokenizer_dir).encode(line(text=text))
        assert tokens.tolist() == ids("a b <end>")
        assert mask.tolist() == [1, 1, 1]


def test_null_fields_are_left_out(tokenizer_dir: str) -> None:
    """Catches: null fields of public data sets reaching the template as the word None."""
    turn = "{% generation %}{% if m.name is defined %}d {% endif %}{{ m.content }} {% endgeneration %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    message = {"role": "assistant", "content": "a", "name": None}
    assert DocumentEncoder(tokenizer_dir, "all", template).encode(line(messages=[message]))[
        0
    ].tolist() == ids("a")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (STRIPS_EARLIER, "leaves out part"),
        (PROMPTS_OTHERWISE, "expected each turn to continue its prompt"),
        (STRIPS_ALWAYS, "leaves out part"),
    ],
)
def test_templates_that_lose_thoughts_are_refused(tokenizer_dir: str, template: str, found: str) -> None:
    """Catches: the check of the prompt removed (a wrong mask), the check of parts removed (no thoughts)."""
    thoughts = {"role": "assistant", "content": "<think> b </think> c"}
    # Said twice, so that what the earlier turn loses is still there for the content check.
    messages = [CHAT[0], thoughts, CHAT[2], thoughts]
    with pytest.raises(LineError, match=found):
        DocumentEncoder(tokenizer_dir, chat_template=template).encode(line(messages=messages))


BAD_LINES = [
    (b'{"text": "a"', "found no JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'["a"]', "found a JSON list"),
    (b'{"prompt": "a"}', "found the fields prompt"),
    (b'{"text": "a", "messages": []}', "found the fields messages, text"),
    (b'{"text": 3}', '"text": found int'),
    (b'{"text": "\\ud800"}', "half a surrogate"),
    (b'{"messages": []}', "an empty list"),
    (b'{"messages": [{"content": "a"}]}', 'message 0: found no "role"'),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        '"content" of message 0: found list',
    ),
]


@pytest.mark.parametrize(("bad", "found"), BAD_LINES)
def test_bad_lines_are_named(tokenizer_dir: str, tmp_path: Path, bad: bytes, found: str) -> None:
    """One line names FILE:LINE (blank lines counted), and nothing is left where the output would be.
    Catches: a check removed, line numbers that skip blank lines, a folder left behind."""
    source = write_lines(tmp_path / "in.jsonl", line(text="a"), b"", bad)
    with pytest.raises(DataError) as error:
        preprocess(PreprocessConfig((source,), tokenizer_dir, str(tmp_path / "out" / "data")))
    assert str(error.value).startswith(f"{source}:3: ") and found in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_templates_may_refuse_messages(tokenizer_dir: str) -> None:
    """Catches: a template's raise_exception ending in a traceback."""
    encoder = DocumentEncoder(tokenizer_dir, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LineError, match="roles must alternate"):
        encoder.encode(line(messages=CHAT))


def many_documents(path: Path, count: int) -> str:
    """Write documents of 1 to 7 words "a"; their lengths and last words tell them apart."""
    return write_lines(
        path, *(line(text=" ".join(["a"] * (k % 7) + [WORDS[6 + k % 4]])) for k in range(count))
    )


def test_files_by_hand_and_replaced(tokenizer_dir: str, tmp_path: Path) -> None:
    """Documents, masks, counts and data types are those written; a second run replaces the first. Catches:
    target_tokens counting first tokens, skipped documents written, --max-documents off by one."""
    no_answer = line(messages=[{"role": "user", "content": "a"}])
    source = write_lines(
        tmp_path / "in.jsonl", line(messages=CHAT), no_answer, line(text="a b"), line(text="d")
    )
    prefix = str(tmp_path / "out" / "data")
    preprocess(PreprocessConfig((many_documents(tmp_path / "old.jsonl", 9),), tokenizer_dir, prefix))
    summary = preprocess(PreprocessConfig((source,), tokenizer_dir, prefix, max_documents=3))
    assert summary == Summary(documents=2, tokens=18 + 3, target_tokens=5 + 2, skipped=1)
    check_pair(prefix, vocab_size=len(WORDS))
    tokens, mask = IndexedDataset(prefix), IndexedDataset(f"{prefix}_loss_mask")
    assert [document.tolist() for document in tokens[0:2]] == [ids(CHAT_TEXT), ids("a b <end>")]
    assert [document.tolist() for document in mask[0:2]] == [CHAT_MASK, [1, 1, 1]]
    assert tokens.index.dtype is np.uint16 and mask.index.dtype is np.uint8
    assert tokens.document_indices.tolist() == [0, 1, 2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "data.bin",
        "data.idx",
        "data_loss_mask.bin",
        "data_loss_mask.idx",
    ]


def test_files_of_two_runs_never_mix(
    tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that breaks off between its renames leaves a set that says so, not old and new files side by
    side.

    Both sets have the same sizes, so nothing but a missing index could tell. Catches: old indexes left in
    place.
    """
    prefix = str(tmp_path / "data")
    first = write_lines(tmp_path / "first.jsonl", line(text="a"))
    second = write_lines(tmp_path / "second.jsonl", line(text="b"))
    preprocess(PreprocessConfig((first,), tokenizer_dir, prefix))
    check_pair(prefix)
    renames = iter([os.replace])  # one, and then the machine goes down
    monkeypatch.setattr("megatron_dms.data.preprocess.os.replace", lambda *names: next(renames)(*names))
    with pytest.raises(StopIteration):
        preprocess(PreprocessConfig((second,), tokenizer_dir, prefix))
    with pytest.raises(DataError, match="found no such file"):
        check_pair(prefix)


def test_no_target_at_all_is_an_error(tokenizer_dir: str, tmp_path: Path) -> None:
    """Catches: an empty data set written without a word."""
    source = write_lines(tmp_path / "in.jsonl", line(messages=[{"role": "user", "content": "a"}]))
    with pytest.raises(DataError, match="no document with a prediction target"):
        preprocess(PreprocessConfig((source,), tokenizer_dir, str(tmp_path / "data")))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_tool_and_workers(tokenizer_dir: str, tmp_path: Path) -> None:
    """Two workers write the bytes of one process, and the tool's last line is its JSON.

    Catches: chunks taken out of order, the chunks still out at the end forgotten.
    """
    source = many_documents(tmp_path / "in.jsonl", 64 * 4 + 3)
    preprocess(PreprocessConfig((source,), tokenizer_dir, str(tmp_path / "one")))
    done = run_tool(
        "preprocess",
        *("--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "two"),
        *("--workers", "2"),
    )
    assert done.status == 0, done.error
    for suffix in (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    answer = json.loads(done.out.splitlines()[-1])
    assert answer["documents"] == 259 and answer["skipped"] == 0 and answer["seconds"] > 0
    assert answer["target_tokens"] == answer["tokens"] - 259


def test_tool_says_what_is_wrong_in_one_line(tokenizer_dir: str, tmp_path: Path) -> None:
    """A worker process meets a bad line: one line on stderr, exit code 2, nothing written. Catches: an
    error lost in a worker, tracebacks, another exit code."""
    source = write_lines(tmp_path / "in.jsonl", *[line(text="a")] * 20, b"{", *[line(text="a")] * 200)
    done = run_tool(
        "preprocess",
        *("--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "out" / "data"),
        *("--workers", "2"),
    )
    assert done.status == 2
    assert len(done.errors) == 1, done.error
    assert done.error.startswith(f"error: {source}:21: found no JSON")
    assert not list((tmp_path / "out").iterdir())


def in_the_middle(tokenizer_dir: str, tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """The tool with two workers, once it has written something, and its output folder."""
    source, out = tmp_path / "pipe.jsonl", tmp_path / "out"
    source.write_bytes((line(text="a b") + b"\n") * 200_000)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
    command += ["--tokenizer", tokenizer_dir, "--output-prefix", str(out / "data"), "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background job ignores Ctrl-C, and hands that on to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(written.stat().st_size for written in out.glob(".data.*/data.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process, out


def workers_of(pid: int) -> list[int]:
    """The process ids of the tool's workers; its other child tracks resources."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def end_of(process: subprocess.Popen[str]) -> str:
    """What the tool said until all its processes had ended: each of them holds stderr."""
    return process.communicate(timeout=60)[1]


def test_tool_killed_leaves_nothing(tokenizer_dir: str, tmp_path: Path) -> None:
    """SIGTERM in the middle of the work removes what was begun and ends the workers.

    Catches: output written in place, SIGTERM without clean-up.
    """
    process, out = in_the_middle(tokenizer_dir, tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    assert "Traceback" not in end_of(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(out.iterdir())


@pytest.mark.slow
def test_tool_interrupted_says_so_once(tokenizer_dir: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the workers too. Catches: workers that print tracebacks, output that is left."""
    process, out = in_the_middle(tokenizer_dir, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    said = end_of(process)
    assert said.splitlines()[-1] == "interrupted; nothing was written" and "Traceback" not in said
    assert process.returncode == 130 and not list(out.iterdir())


@pytest.mark.slow
def test_a_dead_worker_is_named(tokenizer_dir: str, tmp_path: Path) -> None:
    """A worker is killed, as for lack of memory. Catches: a wait for ever, a traceback, no line numbers."""
    process, out = in_the_middle(tokenizer_dir, tmp_path)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    last = end_of(process).splitlines()[-1]
    assert re.match(rf"error: {tmp_path}/pipe.jsonl:\d+: found a dead worker process", last)
    assert last.endswith("use fewer --workers")
    assert process.returncode == 2 and not list(out.iterdir())


def test_a_fault_in_a_worker_names_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that is none of a line's or a template's. Catches: a traceback in place of the line, and the
    words of a worker lost."""

    class Broken:
        def encode_document(self, row: bytes) -> None:
            raise RuntimeError("the tokenizer is broken")

    monkeypatch.setattr(preprocessing, "_encoder", Broken())
    chunk = [Line("in.jsonl", number, b"{}") for number in (1, 2)]
    with pytest.raises(DataError, match=r"^in.jsonl:1: found a dead worker process .* up to in.jsonl:2,"):
        preprocessing._encode_in_worker(chunk)
    assert "RuntimeError: the tokenizer is broken" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_end_with_a_tool_that_is_killed(tokenizer_dir: str, tmp_path: Path) -> None:
    """kill -9 of the tool alone. Catches: workers that wait for chunks for ever."""
    process, _ = in_the_middle(tokenizer_dir, tmp_path)
    assert len(workers_of(process.pid)) == 2
    os.kill(process.pid, signal.SIGKILL)
    end_of(process)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"workers": 0}, "--workers: found 0"),
        ({"max_documents": 0}, "--max-documents: found 0"),
        ({"inputs": ()}, "--input: found no file"),
    ],
)
def test_config_is_checked(changes: dict[str, object], found: str) -> None:
    """Catches: each range check removed."""
    with pytest.raises(ValueError, match=found):
        PreprocessConfig(**({"inputs": ("a",), "tokenizer": "t", "output_prefix": "p"} | changes))


def test_missing_files_are_named(tokenizer_dir: str, tmp_path: Path) -> None:
    """Catches: a missing input or tokenizer found only after work was done, or by a traceback."""
    with pytest.raises(DataError, match="found no such file, expected a JSONL file"):
        preprocess(PreprocessConfig((str(tmp_path / "no.jsonl"),), tokenizer_dir, str(tmp_path / "data")))
    source = write_lines(tmp_path / "in.jsonl", line(text="a"))
    with pytest.raises(ValueError, match="--tokenizer: found no usable tokenizer"):
        preprocess(PreprocessConfig((source,), str(tmp_path), str(tmp_path / "data")))
