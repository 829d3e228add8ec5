"""One JSONL line → token ids and a loss mask.

Two kinds of line: {"messages": [{"role": …, "content": …}, …]} goes through the tokenizer's chat template,
{"text": …} is tokenised as it stands and closed with the EOS token.

The assistant's part of a chat is found in the rendered text, in characters, and carried over to tokens by the
tokenizer's offsets. The template's {% generation %} markers tell it; if the template has none, each prefix of
the conversation is rendered. transformers' own return_assistant_tokens_mask reads the same markers, but if
the last character of a span belongs to no token (a blank, for a tokenizer that drops blanks), it marks
everything up to the end of the conversation, including the user's turns.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from megatron_dms.upstream.transformers_chat import render_with_spans

LOSS_ON = ("assistant", "all")
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the same pattern as transformers'


class LineError(ValueError):
    """A line that cannot be encoded; the message says what was found, what was expected and the fix."""


class DocumentEncoder:
    """Encode lines with one tokenizer.

    Args:
        tokenizer: directory of an HF tokenizer (or a hub name).
        loss_on: "assistant" (the assistant's tokens with the end of the turn) or "all". In lines of text all
            tokens count.
        chat_template: a Jinja template that replaces the tokenizer's own.

    Raises:
        ValueError: loss_on is unknown, the tokenizer cannot be loaded, or it cannot tell which characters a
            token came from.
    """

    def __init__(self, tokenizer: str, loss_on: str = "assistant", chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        if loss_on not in LOSS_ON:
            raise ValueError(f"--loss-on: found {loss_on!r}, expected one of {', '.join(LOSS_ON)}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"--tokenizer: found no usable tokenizer in {tokenizer} "
                f"({reason[0] if reason else 'no reason given'}), "
                "expected a directory with tokenizer.json and tokenizer_config.json"
            ) from error
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"--tokenizer: found a slow tokenizer in {tokenizer}, expected a fast one (tokenizer.json), "
                "which knows the characters of each token; convert it with AutoTokenizer(…, "
                "use_fast=True).save_pretrained"
            )
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.loss_on = loss_on

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    def encode(self, line: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Encode one line.

        Returns:
            ids [n] int32 and mask [n] uint8 (1 = the token counts as a prediction target).

        Raises:
            LineError: the line is no document, or its loss mask cannot be told.
        """
        document = _parse(line)
        if "text" in document:
            return self._encode_text(document["text"])
        return self._encode_chat(document["messages"])

    def _encode_text(self, text: Any) -> tuple[np.ndarray, np.ndarray]:
        _require_text(text, '"text"')
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise LineError(
                "found a tokenizer without an EOS token, expected one to close the document; set eos_token"
            )
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids or ids[-1] != eos:  # some tokenizers append it themselves
            ids = [*ids, eos]
        return np.asarray(ids, np.int32), np.ones(len(ids), np.uint8)

    def _encode_chat(self, messages: Any) -> tuple[np.ndarray, np.ndarray]:
        from jinja2.exceptions import TemplateError

        messages = _checked_messages(messages)
        if not self.tokenizer.chat_template:
            raise LineError(
                "found chat messages but a tokenizer without chat template; give --chat-template FILE"
            )
        try:
            rendered, spans, exact = self._render(messages)
        except TemplateError as error:
            raise LineError(f"the chat template refuses these messages: {error}; mend them") from error
        _check_nothing_dropped(messages, rendered)
        # No special tokens: the template writes them into the text.
        encoding = self.tokenizer(
            rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(encoding["input_ids"], np.int32)
        if self.loss_on == "all":
            return ids, np.ones(len(ids), np.uint8)
        begin, end = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.uint8)
        for span_begin, span_end in spans:
            inside = np.flatnonzero((begin < span_end) & (end > span_begin) & (begin < end))
            # The model does not say what a template puts after the end of the turn (a newline, mostly).
            if not exact:
                closing = np.flatnonzero(ids[inside] == self.tokenizer.eos_token_id)
                inside = inside[: closing[-1] + 1] if closing.size else inside
            mask[inside] = 1
        return ids, mask

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]], bool]:
        """Render a chat.

        Returns:
            The text, the assistant's spans in characters, and whether the spans end exactly at the end of
            the turn.
        """
        if self.loss_on == "all":
            return self._apply(messages), [], True
        template = self.tokenizer.get_chat_template()
        if _GENERATION_MARKER.search(template):
            return *render_with_spans(self.tokenizer, messages, template), True
        rendered = self._apply(messages)
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # A conversation that opens with the assistant has no prompt to render: its span begins at 0.
            prompt = self._apply(messages[:k], add_generation_prompt=True) if k else ""
            turn = self._apply(messages[: k + 1])
            if not (turn.startswith(prompt) and rendered.startswith(turn)):
                raise LineError(
                    f"message {k}: found a chat template that changes a turn once others follow (by "
                    "stripping earlier thoughts, mostly) or prompts for another one, expected each turn to "
                    "continue its prompt and to stay; give --chat-template FILE with {% generation %} "
                    "markers, or leave one assistant message per line"
                )
            spans.append((len(prompt), len(turn)))
        return rendered, spans, False

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert isinstance(rendered, str)  # because tokenize=False
        return rendered


def _parse(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except UnicodeDecodeError as error:
        raise LineError(
            f"found bytes that are not UTF-8 ({error.reason}), expected UTF-8; convert the file"
        ) from error
    except json.JSONDecodeError as error:
        raise LineError(
            f"found no JSON ({error.msg} at character {error.pos + 1}), expected one object per line; mend "
            "or delete it"
        ) from error
    if not isinstance(document, dict):
        raise LineError(
            f"found a JSON {type(document).__name__}, expected an object; mend or delete the line"
        )
    if ("text" in document) == ("messages" in document):
        keys = ", ".join(sorted(document)) or "none"
        raise LineError(
            f'found the fields {keys}, expected either "messages" or "text"; rename or drop a field'
        )
    return document


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Check the messages and drop their fields that are null, which templates would print as "None"."""
    if not isinstance(messages, list) or not messages:
        raise LineError(
            f'"messages": found {type(messages).__name__ if messages != [] else "an empty list"}, expected a '
            "list of {role, content}; mend or delete the line"
        )
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LineError(
                f'message {k}: found no "role", expected {{role, content}}; mend or delete the line'
            )
        _require_text(message.get("content"), f'"content" of message {k}')
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _require_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise LineError(f"{name}: found {type(value).__name__}, expected a string; mend or delete the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which no tokenizer takes
        raise LineError(
            f"{name}: found half a surrogate pair, expected Unicode text; mend the line"
        ) from error


def _check_nothing_dropped(messages: list[dict[str, Any]], rendered: str) -> None:
    """Refuse a template that leaves out what the assistant said (DeepSeek-R1's drops all up to </think>).

    Blanks are not compared, because many templates strip or add blanks.
    """
    squeezed = "".join(rendered.split())
    for k, message in enumerate(messages):
        if message["role"] == "assistant" and "".join(message["content"].split()) not in squeezed:
            raise LineError(
                f"message {k}: found a chat template that leaves out part of the assistant's content "
                "(thoughts up to </think>, mostly), expected all of it; give --chat-template FILE with one "
                "that keeps it"
            )
