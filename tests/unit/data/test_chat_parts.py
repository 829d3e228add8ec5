"""Every part of a chat reaches the tokens, or the line is refused; targets are what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.data import template_parts
from megatron_dms.data.chat_encoder import DocumentEncoder, LineError
from tests.support import chat_templates as templates
from tests.support.tools import ROOT, run_tool

QWEN3_WITH_THOUGHTS = (ROOT / "examples" / "qwen3_with_thoughts.jinja").read_text(encoding="utf-8")
USER = {"role": "user", "content": "two plus two?"}
ANSWER = {"role": "assistant", "content": "four."}
WHERE = "{{ t.function.parameters.properties.city.description }}"
ARGUMENTS = {"city": "Bern", "days": 3}


def call(arguments: object = ARGUMENTS, **more: object) -> dict[str, Any]:
    one = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [one], **more}


def tool(name: str = "weather", **more: object) -> dict[str, Any]:
    properties = {"city": {"type": "string", "description": "where"}, "days": {"type": "integer"}}
    function = {
        "name": name,
        "description": "forecast",
        "parameters": {"type": "object", "properties": properties},
    }
    return {"type": "function", "function": function | more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return templates.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def encoded(folder: str, template: str, line: dict[str, Any], **options: Any) -> tuple[str, str]:
    """All tokens and the targets, as text."""
    encoder = DocumentEncoder(folder, chat_template=template, **options)
    ids, mask = encoder.encode(json.dumps(line).encode())
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[mask == 1])


LOST = {
    "thoughts beside": (templates.CHATML, [USER, {**ANSWER, "reasoning_content": "hm"}], "reasoning_content"),
    "thoughts that a word of the template holds": (
        templates.CHATML, [USER, {**ANSWER, "thinking": "a"}], "thinking"),
    "a field nobody knows": (templates.CHATML, [USER, {**ANSWER, "plan": "add them"}], "plan"),
    "a call": (templates.CHATML, [USER, call()], "tool_calls.function.name"),
    "a former call": (
        templates.CHATML,
        [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}],
        "tool_calls.function.name",
    ),
    "arguments that are numbers": (
        templates.CHATML_TOOLS.replace("c.function | tojson", "c.function.name"),
        [USER, call({"a": 1})],
        "tool_calls.function.arguments",
    ),
    "the second call": (
        templates.LLAMA3, [USER, {**call(), "tool_calls": call()["tool_calls"] * 2}], "tool_calls"),
    "a text beside a call": (templates.LLAMA3, [USER, call(content="let me see")], "content"),
    "a role": (
        templates.CHATML_KNOWN, [{"role": "developer", "content": "be brief"}, USER, ANSWER], "developer"),
    "what a tool says": (templates.CHATML_KNOWN, [USER, {"role": "tool", "content": "4"}, ANSWER], "tool"),
    "one of two system messages": (
        templates.ONE_SYSTEM,
        [{"role": "system", "content": "a"}, {"role": "system", "content": "a"}, USER, ANSWER],
        "message 0 (role system)",
    ),
    "the end of a text": (
        templates.CHATML.replace("m.content", "m.content[:9]"), [USER, ANSWER], "two plus two?"),
    "the middle of a text": (
        templates.CHATML.replace("m.content", "m.content | replace('plus', '')"), [USER, ANSWER], "content"),
    "earlier thoughts": (
        templates.QWEN3,
        [USER, {**ANSWER, "reasoning_content": "hm"}, USER, ANSWER],
        "reasoning_content",
    ),
    "earlier thoughts in the content": (
        templates.QWEN3,
        [USER, {**ANSWER, "content": "<think>\nhm\n</think>\n\nfour."}, USER, ANSWER],
        "content",
    ),
    "thoughts up to the tag": (
        templates.DEEPSEEK, [USER, {**ANSWER, "content": "<think>\nhm</think>4"}], "content"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_a_template_that_loses_a_part_is_refused(folder: str, case: str) -> None:
    """Catches: a kind of part without marks, a part excused by the same words elsewhere, a missing end."""
    template, messages, said = LOST[case]
    for loss_on in ("assistant", "all"):
        with pytest.raises(LineError, match="leaves out part of") as error:
            encoded(folder, template, {"messages": messages}, loss_on=loss_on)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert "--chat-template" in str(error.value)


@pytest.mark.parametrize("lost", ["name", "description", "days"])
def test_tools_that_are_lost_are_refused(folder: str, lost: str) -> None:
    """Catches: tools that never reach the template, and each half of the check of their names."""
    line = {"messages": [USER, ANSWER], "tools": [tool()]}
    with pytest.raises(LineError, match=r"beside the messages: .*leaves out part of tools"):
        encoded(folder, templates.CHATML, line)
    text, targets = encoded(folder, templates.CHATML_TOOLS, line)
    assert text.startswith("<|im_start|>system\n[") and "forecast" in text and targets == "four.<|im_end|>"
    parts = {"name": "t.function.name", "description": "t.function.description",
             "days": "t.function.parameters.properties | list | join"}  # fmt: skip
    written = "".join(f"{{{{ {value} }}}} " for key, value in parts.items() if key != lost)
    template = "{% for t in tools %}" + written + WHERE + "{% endfor %}" + templates.CHATML
    with pytest.raises(LineError, match="leaves out part of tools"):
        encoded(folder, template, line)


def test_records_are_counted_and_fields_can_be_dropped(folder: str) -> None:
    """Catches: ids that refuse a line, a loss that no count shows, and --drop-field that drops nothing."""
    messages = [{**USER, "name": "Ann", "n": None}, {**ANSWER, "plan": "add", "rank": {"of": [3]}}]
    row = {"messages": messages, "source": "web", "nothing": None, "url": "u"}
    encoder = DocumentEncoder(folder, dropped=("plan", "url"))
    document = encoder.encode_document(row)
    counted = ["column source", "column url", "name of messages", "plan of messages", "rank of messages"]
    assert sorted(document.left_out) == counted
    assert "add" not in encoder.tokenizer.decode(document.ids)


TAIL = '{"city": "Bern", "days": 3}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("template", "line", "targets"),
    [
        # The empty block of thoughts that the template writes is no target.
        (templates.QWEN3, [USER, ANSWER, USER, ANSWER], "four.<|im_end|>four.<|im_end|>"),
        # Of thoughts that are said, the tag is.
        (templates.QWEN3, [USER, {**ANSWER, "content": "<think>\nhm\n</think>\n\nfour."}],
         "<think>\nhm\n</think>\n\nfour.<|im_end|>"),
        (templates.QWEN3, [USER, ANSWER, USER, {**ANSWER, "reasoning_content": "hm"}],
         "four.<|im_end|><think>\nhm\n</think>\n\nfour.<|im_end|>"),
        (templates.QWEN3, [USER, call(content=None), {"role": "tool", "content": "wet"}, ANSWER],
         '<tool_call>\n{"name": "weather", "arguments": ' + TAIL + "four.<|im_end|>"),
        (templates.LLAMA3, [USER, {**call(), "tool_calls": json.dumps(call()["tool_calls"])}],
         '{"name": "weather", "parameters": {"city": "Bern", "days": 3}}<|im_end|>'),
        (templates.CHATML, [USER, {**ANSWER, "tool_calls": []}], "four.<|im_end|>"),
        (templates.LLAMA3, [USER, call(), {"role": "tool", "content": 'say "wet"'}, ANSWER],
         '{"name": "weather", "parameters": {"city": "Bern", "days": 3}}<|im_end|>four.<|im_end|>'),
        (templates.MISTRAL,
         [{"role": "system", "content": "be brief"}, USER, ANSWER, USER, {**ANSWER, "content": " a "}],
         " four.</s> a</s>"),
        (templates.DEEPSEEK, [USER, call("{}"), USER, ANSWER], "weather\n{}</s>four.</s>"),
        (templates.ONE_SYSTEM, [USER, ANSWER, ANSWER, USER], "four.<|im_end|>four.<|im_end|>"),
        # The assistant speaks first: not the header.
        (templates.CHATML, [ANSWER, USER, ANSWER], "four.<|im_end|>four.<|im_end|>"),
        ("<s>you are Q{{ '\n' }}" + templates.CHATML, [ANSWER, USER], "four.<|im_end|>"),
        # The whole chat is closed by a further token.
        (templates.CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
         [USER, ANSWER, USER, ANSWER], "four.<|im_end|>four.<|im_end|>\n<|endoftext|>"),
        # No token closes a turn.
        (("{% for m in messages %}{{ m.role }}: {{ m.content }} END\n{% endfor %}"
          "{% if add_generation_prompt %}assistant: {% endif %}"), [USER, ANSWER, USER], "four. END"),
        ("{% for m in messages %}{{ m.content }} END\n{% endfor %}",
         [USER, {**ANSWER, "content": "a<|endoftext|>b"}], "a<|endoftext|>b END"),
        (templates.CHATML, [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "four.<|im_end|>"),
        (templates.CHATML, [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}],
         "four.<|im_end|>"),
        # EOS in the middle of an answer.
        (templates.CHATML, [USER, {**ANSWER, "content": "a<|endoftext|>b"}], "a<|endoftext|>b<|im_end|>"),
        (QWEN3_WITH_THOUGHTS, [USER, ANSWER, USER, ANSWER], "four.<|im_end|>four.<|im_end|>"),
        (QWEN3_WITH_THOUGHTS, [USER, {**ANSWER, "reasoning_content": "hm"}, USER, {**ANSWER, "weight": 0}],
         "<think>\nhm\n</think>\n\nfour.<|im_end|>"),
        (QWEN3_WITH_THOUGHTS, [USER, call(content="see"), {"role": "tool", "content": "wet"}, ANSWER],
         'see\n<tool_call>\n{"name": "weather", "arguments": ' + TAIL + "four.<|im_end|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_targets(
    folder: str, tmp_path: Path, eos: str, template: str, line: list[dict], targets: str
) -> None:
    """What the model is to say, written by hand; which token is EOS changes nothing. Catches: a header, an
    empty block, a newline or an earlier end among the targets; a weight that is ignored."""
    if eos != "<|im_end|>":
        folder = templates.byte_tokenizer(tmp_path, eos=eos)
    assert encoded(folder, template, {"messages": line})[1] == targets


def test_weights_are_not_ignored(folder: str) -> None:
    """Catches: a weight of 0 that --loss-on all overrules without a word."""
    line = {"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1}]}
    assert encoded(folder, templates.CHATML, line)[1] == "four.<|im_end|>"
    with pytest.raises(LineError, match="weight 0 and --loss-on all"):
        encoded(folder, templates.CHATML, line, loss_on="all")
    text, targets = encoded(folder, templates.CHATML, line, loss_on="all", dropped=("weight",))
    assert text == targets


def test_qwen3_with_thoughts_writes_what_qwen3_writes(folder: str) -> None:
    """Without earlier thoughts the two templates give the same text. Catches: another header, tool or
    tail."""
    for messages in (
        [USER, ANSWER, USER, ANSWER],
        [{"role": "system", "content": "be brief"}, USER, {**ANSWER, "reasoning_content": "hm"}],
        [USER, call(content="see"), {"role": "tool", "content": "wet"}, ANSWER],
    ):
        line = {"messages": messages}
        assert encoded(folder, QWEN3_WITH_THOUGHTS, line)[0] == encoded(folder, templates.QWEN3, line)[0]


def test_templates_that_look_at_the_text(folder: str) -> None:
    """A mark changes what such a template does, and no part is lost. Catches: a refusal for the marks' sake,
    and a loss that is excused because the marks differ."""
    looks = "{% if messages[0].content == 'two plus two?' %}adding:{{ '\n' }}{% endif %}" + templates.CHATML
    assert encoded(folder, looks, {"messages": [USER, ANSWER, USER]})[1] == "four.<|im_end|>"
    with pytest.raises(LineError, match="leaves out part of plan"):
        encoded(folder, looks, {"messages": [{**USER, "plan": "a"}, ANSWER]})
    private = {"messages": [{**USER, "content": "\U00100000 two"}, ANSWER]}
    assert encoded(folder, templates.CHATML, private)[1] == "four.<|im_end|>"


@pytest.mark.parametrize(
    "written",
    [
        "c.function.arguments | tojson(indent=2)",
        "c.function.arguments",
        "c.function.arguments | tojson | tojson",
        "c | string",
    ],
)
def test_forms_of_a_string(folder: str, written: str) -> None:
    """A template may quote what it writes. Catches: each form that is not known."""
    template = templates.CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ WRITTEN }}{% endfor %}",
    ).replace("WRITTEN", written)
    line = {"messages": [USER, call({"city": 'say "ä"\n&', "more": [1, {"deep": "ü"}]})]}
    assert "ü" in encoded(folder, template, line)[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, 'message 1: found "weight": 0.5'),
        ({"messages": [USER, {**ANSWER, "content": None}]}, '"content" of message 1: found NoneType'),
        ({"messages": [USER, ANSWER], "tools": "weather"}, '"tools": found no list of objects'),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, '"chat_template_kwargs": found list'),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]}, "type image_url"),
        ({"messages": [{"from": "alien", "value": "x"}]}, 'found "from": "alien"'),
        ({"messages": [{"from": "function_call", "value": "x"}]}, "a function_call that is no JSON"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "thinking", "thinking": "a"}],
                             "thinking": "b"}]},
         "found thoughts in the content and beside it"),
    ],
)  # fmt: skip
def test_what_no_template_takes_is_named(folder: str, line: dict, said: str) -> None:
    """Catches: each check removed."""
    with pytest.raises(LineError) as error:
        encoded(folder, templates.CHATML, line)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_marks_that_are_escaped() -> None:
    """JSON in ASCII and Python write a mark as an escape. Catches: either form unread."""
    twin, parts = template_parts.mark({"messages": [{"role": "user", "content": "ä b"}]})
    content = twin["messages"][0]["content"]
    for written in (content, json.dumps(content), repr(content)):
        text, places = template_parts.locate(written, parts)
        assert places[0] is not None and text[places[0].begin : places[0].end].endswith(" b")


def test_variables_of_the_template(folder: str) -> None:
    """Catches: chat_template_kwargs not passed on, and a prompt remembered for other variables."""
    encoder = DocumentEncoder(folder, chat_template=templates.QWEN3)
    chat = {"messages": [USER, ANSWER]}
    plain = encoder.encode(chat)
    off = encoder.encode(chat | {"chat_template_kwargs": {"enable_thinking": False}})
    assert plain[0].tolist() == off[0].tolist() and plain[1].tolist() == off[1].tolist()
    shout = DocumentEncoder(folder, chat_template="{{ note }}" + templates.CHATML)
    ids, _ = shout.encode(chat | {"chat_template_kwargs": {"note": "NOTE"}})
    assert shout.tokenizer.decode(ids).startswith("NOTE")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 + messages[0]['content'] }}", "fails on the types of this line (TypeError:"),
        ("{{ messages[7].content.x }}", "fails on the types of this line (UndefinedError:"),
        ("{{ 1 // (messages | length - 2) }}", "fails on the types of this line (ZeroDivisionError:"),
        (
            (
                "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
                "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
            ),
            "fails on the types of this line (TypeError:",
        ),
        ("{% for %}", "found a chat template that is no Jinja"),
    ],
)
def test_a_template_that_fails_is_one_line(folder: str, tmp_path: Path, template: str, said: str) -> None:
    """The same line with one worker and with two. Catches: a traceback, and "a dead worker"."""
    source, jinja = tmp_path / "in.jsonl", tmp_path / "template.jinja"
    source.write_text(json.dumps({"messages": [USER, call()]}) + "\n")
    jinja.write_text(template)
    words = ["--input", source, "--tokenizer", folder, "--output-prefix", tmp_path / "out" / "data"]
    found = [
        run_tool("preprocess", *words, "--chat-template", jinja, "--workers", workers) for workers in (1, 2)
    ]
    for done in found:
        assert done.status == 2 and done.error == found[0].error
        assert len(done.errors) == 1 and done.error.startswith(f"error: {source}:1: ") and said in done.error
