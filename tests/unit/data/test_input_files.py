"""Files and forms of rows that public data come in, and what is refused of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.data import input_files
from megatron_dms.data.chat_encoder import DocumentEncoder, LineError
from megatron_dms.data.preprocess import PreprocessConfig, Summary, preprocess
from megatron_dms.errors import DataError
from tests.support import chat_templates as templates
from tests.support.tools import run_tool

USER = {"role": "user", "content": "two plus two?"}
ANSWER = {"role": "assistant", "content": "four."}
ROWS = [{"messages": [USER, {**ANSWER, "content": f"four. {k} ä"}]} for k in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return templates.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def plain(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(rows: list[dict]) -> bytes:
    import pyarrow

    half = len(rows) // 2  # two frames, as parallel compressors write
    frames = [pyarrow.compress(plain(part), "zstd", asbytes=True) for part in (rows[:half], rows[half:])]
    return b"".join(frames)


def parquet(rows: list[dict], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def arrow(rows: list[dict], path: Path, new: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, getattr(pyarrow.ipc, new)(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[list[dict], Path], object]] = {
    "a.jsonl": lambda rows, path: path.write_bytes(plain(rows)),
    "mark.jsonl": lambda rows, path: path.write_bytes(b"\xef\xbb\xbf" + plain(rows)),
    "a.jsonl.gz": lambda rows, path: path.write_bytes(
        gzip.compress(plain(rows[:9])) + gzip.compress(plain(rows[9:]))),
    "a.jsonl.zst": lambda rows, path: path.write_bytes(zstd(rows)),
    "a.jsonl.bz2": lambda rows, path: path.write_bytes(bz2.compress(plain(rows))),
    "a.jsonl.xz": lambda rows, path: path.write_bytes(lzma.compress(plain(rows))),
    "one_line.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "lines.json": lambda rows, path: path.write_text(
        "\n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n\n"),
    "array.json.gz": lambda rows, path: path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode())),
    "array_mark.json": lambda rows, path: path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode()),
    "a.parquet": parquet,
    "stream.arrow": lambda rows, path: arrow(rows, path, "new_stream"),
    "file.arrow": lambda rows, path: arrow(rows, path, "new_file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("piece", [1 << 20, 40])
def test_every_file_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece: int
) -> None:
    """Catches: a second frame that is not read, an element cut at the end of a piece, a byte order mark."""
    monkeypatch.setattr(input_files, "_CHARACTERS_AT_A_TIME", piece)
    path = tmp_path / name
    WRITERS[name](ROWS, path)
    found = list(input_files.lines([str(path)], None))
    assert [row if isinstance(row := line.text, dict) else json.loads(row) for line in found] == ROWS
    step = 12 if name == "lines.json" else 0 if name == "one_line.json" else 1
    if not name.startswith("array"):
        assert [line.number for line in found[:3]] == [3 if step == 12 else 1, *[
            (3 if step == 12 else 1) + step * k for k in (1, 2)]]  # fmt: skip
    assert len(list(input_files.lines([str(path)] * 2, 301))) == 301


BAD_FILES = {
    "cut.gz": (gzip.compress(plain(ROWS))[:-400], "cannot be read from here on"),
    "cut.zst": (zstd(ROWS)[:-40], "cannot be read from here on"),
    "cut.xz": (lzma.compress(plain(ROWS))[:-40], "cannot be read from here on"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read from here on"),
    "a.zip": (b"PK\x03\x04 zip", "found a zip archive"),
    "utf16": ("[]".encode("utf-16"), "found UTF-16"),
    "open.json": (b'[\n{"text": "a"},\n{"text": "b"}', "bad:3: found an array without its end"),
    "comma.json": (b'[\n{"text": "a"}\n{"text": "b"}]', "bad:3: found no comma"),
    "broken.json": (b'[\n{"text": "a"},\n{"text": }]', "bad:3: found an element that is no JSON"),
    "after.json": (b'[\n{"text": "a"}] x', "bad:2: found text after the end"),
    "texts.json": (b'["a"]', "bad:1: found a JSON str"),
    "bytes.json": (b'[{"text": "\xff"}]', "cannot be read from here on"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_one_line(folder: str, tmp_path: Path, case: str) -> None:
    """Catches: a traceback, rows of half a file, and lines counted wrongly in an array."""
    content, said = BAD_FILES[case]
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        preprocess(PreprocessConfig((str(path),), folder, str(tmp_path / "out" / "data")))
    assert (
        said in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith(str(path))
    )
    assert not list((tmp_path / "out").iterdir())


OPENR1 = {
    "problem": "two plus two?", "answer": "4", "generations": ["<think>hm</think>4"], "uuid": "u",
    "is_reasoning_complete": [True], "correctness_llama": None, "messages": [USER, ANSWER],
}  # fmt: skip
SHAREGPT = [{"from": "human", "value": "two plus two?"}, {"from": "gpt", "value": "four."}]
CHAT = "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour.<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "fields", "text"),
    [
        ({"text": None, "messages": [USER, ANSWER]}, (), CHAT),
        ({"conversations": SHAREGPT, "messages": None}, (), CHAT),
        ({"conversations": [USER, ANSWER]}, (), CHAT),
        ({"messages": json.dumps([USER, ANSWER])}, (), CHAT),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "two plus two?"}]}, ANSWER]}, (), CHAT),
        ({"messages": [{**USER, "content": ["two plus", "two?"]}, ANSWER]}, (),
         CHAT.replace("plus two", "plus\ntwo")),
        ({"prompt": [USER], "completion": [ANSWER]}, (), CHAT),
        ({"conversations": SHAREGPT, "system": "be brief"}, (),
         "<|im_start|>system\nbe brief<|im_end|>\n" + CHAT),
        ({"messages": [USER, ANSWER], "text": "a"}, ("messages",), CHAT),
        ({"chat": SHAREGPT}, ("chat",), CHAT),
        ({"messages": [USER, ANSWER], "text": "a"}, ("text",), "<s>a<|im_end|>"),
        ({"prompt": "a ", "completion": "b"}, (), "<s>a b<|im_end|>"),
        ({"question": "a ", "answer": "b", "prompt": "c"}, ("question", "answer"), "<s>a b<|im_end|>"),
        (OPENR1, (), CHAT),
        # BOS and EOS that are in the text already are not doubled.
        ({"text": "<s>a<|im_end|>"}, (), "<s>a<|im_end|>"),
        ({"prompt": "<s>a", "completion": "b"}, (), "<s>ab<|im_end|>"),
    ],
)  # fmt: skip
def test_forms_of_rows(folder: str, row: dict[str, Any], fields: tuple[str, ...], text: str) -> None:
    """Catches: each form not known, a null column that counts, a column that --field does not choose."""
    encoder = DocumentEncoder(folder, fields=fields)
    ids, mask = encoder.encode(json.dumps(row).encode())
    assert encoder.tokenizer.decode(ids) == text
    said = {"<s>a<|im_end|>": text, "<s>a b<|im_end|>": "b<|im_end|>", "<s>ab<|im_end|>": "b<|im_end|>"}
    assert encoder.tokenizer.decode(ids[mask == 1]) == said.get(text, "four.<|im_end|>")


def test_bos_of_the_template_and_of_the_text(folder: str) -> None:
    """Catches: BOS written by a template before a text that has one."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}!{% endif %}"
    encoder = DocumentEncoder(folder, "all", template)
    ids, mask = encoder.encode({"messages": [{**USER, "content": "<s>hi"}, ANSWER]})
    assert encoder.tokenizer.decode(ids) == "<s>hifour." and len(mask) == len(ids)


def test_only_the_completion_is_a_target(folder: str) -> None:
    """Catches: an answer of the prompt that is learned."""
    row = {"prompt": [USER, {**ANSWER, "content": "five."}, USER], "completion": [ANSWER]}
    encoder = DocumentEncoder(folder)
    ids, mask = encoder.encode(row)
    assert encoder.tokenizer.decode(ids[mask == 1]) == "four.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, (), "found the fields chosen, prompt, expected"),
        ({"messages": [USER], "conversations": SHAREGPT}, (), "say which one with --field messages"),
        ({"messages": [USER]}, ("chat",), "found the fields messages, expected chat; check --field"),
        ({"prompt": "a", "completion": [ANSWER]}, (), '"completion": found list'),
        ({"prompt": [USER], "completion": "a"}, (), '"completion": found str'),
        ({"messages": "a"}, (), '"messages": found str'),
    ],
)
def test_rows_that_are_ambiguous_are_refused(
    folder: str, row: dict, fields: tuple[str, ...], said: str
) -> None:
    """Catches: a guess where two columns may be meant, and each check of a type."""
    with pytest.raises(LineError) as error:
        DocumentEncoder(folder, fields=fields).encode(row)
    assert said in str(error.value)


def test_parquet_rows_are_counted_and_chats_of_several_forms_mix(folder: str, tmp_path: Path) -> None:
    """Tools in parquet have the fields of all other tools, as nulls. Catches: those nulls in the text, and
    columns that are not counted."""
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": {name: "x"}}} for name in ("one", "two")
    ]
    rows = [
        {"messages": [USER, {**ANSWER, "content": None, "tool_calls": [call]}], "uuid": "u"} for call in calls
    ]
    path = tmp_path / "in.parquet"
    parquet(rows, path)
    prefix = str(tmp_path / "data")
    template = templates.CHATML_TOOLS
    summary = preprocess(PreprocessConfig((str(path),), folder, prefix, chat_template=template))
    assert summary == Summary(2, summary.tokens, summary.target_tokens, 0, {"column uuid": 2})
    text = (tmp_path / "data.bin").read_bytes()
    expected = sum(len(DocumentEncoder(folder, chat_template=template).encode(row)[0]) for row in rows)
    assert summary.tokens == expected and text


def test_the_tool_names_what_is_in_no_token(folder: str, tmp_path: Path) -> None:
    """The flags reach the encoder, the summary has the counts. Catches: a flag that is dropped."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(plain([{"chat": [USER, {**ANSWER, "plan": "add"}], "uuid": "u"}] * 2))
    words = ["--input", source, "--tokenizer", folder, "--output-prefix", tmp_path / "data"]
    done = run_tool("preprocess", *words, "--field", "chat", "--drop-field", "plan")
    assert done.status == 0, done.error
    counts = {"column uuid": 2, "plan of messages": 2}
    assert json.loads(done.out.splitlines()[-1])["not_in_tokens"] == counts
    assert "note: in no token: column uuid (2 documents), plan of messages (2 documents)" in done.error


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_as_prefix_is_refused(tmp_path: Path, ending: str) -> None:
    """Catches: files written beside the folder, or under a hidden name."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"--output-prefix: found the folder .*give {tmp_path}/out/train"):
        PreprocessConfig(("x/train.jsonl.gz",), "t", f"{tmp_path}/out{ending}")
    with pytest.raises(ValueError, match="--output-prefix: found the folder"):
        PreprocessConfig(("x",), "t", f"{tmp_path}/new/")
    with pytest.raises(ValueError, match="--field: found 3 columns"):
        PreprocessConfig(("a",), "t", "p", fields=("a", "b", "c"))
    with pytest.raises(DataError, match="found a folder, expected files"):
        input_files.check_inputs([str(tmp_path)])
