"""Prompts from JSONL: each line is an object with `prompt`, a text, or `messages`, a chat.

Other keys are not read. Every error is a ValueError that names the file and the line.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """The prompt of one line."""

    where: str
    """File and line, for error messages."""
    line: int
    """The number of the line, counted from 1."""
    content: str | list[dict[str, Any]]
    """A text, or the messages of a chat, of which the last is not the assistant's."""

    def encode(self, tokenizer: Any) -> list[int]:
        """Token ids, at least one. The tokenizer's template renders a chat up to the start of the answer."""
        is_text = isinstance(self.content, str)
        text = self.content if is_text else self._rendered(tokenizer)
        try:  # a chat gets no special tokens: the template has written them into the text
            ids = tokenizer(text, add_special_tokens=is_text)["input_ids"]
        except TypeError as error:  # for example half of a surrogate pair
            raise ValueError(f"{self.where}: the tokenizer does not take this text: {error}") from error
        if not ids:
            raise ValueError(f"{self.where}: a prompt of 0 tokens, expected at least one")
        return list(ids)

    def _rendered(self, tokenizer: Any) -> str:
        from jinja2.exceptions import TemplateError

        if not tokenizer.chat_template:
            raise ValueError(
                f"{self.where}: found messages, but the tokenizer has no chat template; give the text as "
                "`prompt`"
            )
        try:
            return tokenizer.apply_chat_template(self.content, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{self.where}: the chat template refuses these messages: {error}") from error


def read_prompts(path: Path) -> list[Prompt]:
    """Read all lines of a file that are not blank; there must be at least one."""
    with path.open(encoding="utf-8", newline="\n") as file:  # no other character ends a line of JSON
        try:
            lines = [(number, text) for number, text in enumerate(file, 1) if text.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts; expected a line of JSON for each")
    return [Prompt(f"{path}, line {number}", number, _content(text, path, number)) for number, text in lines]


def _content(text: str, path: Path, number: int) -> str | list[dict[str, Any]]:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: expected an object with either `prompt` or `messages`")
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError(f"{where}: `prompt` is no text")
        return entry["prompt"]
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"{where}: `messages` is no list of objects with the texts `role` and `content`")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's; leave out what is to be generated")
    return messages


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "content"))
