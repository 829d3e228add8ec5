"""Render chats through a tokenizer's template, and refuse what the template loses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from megatron_dms.data import template_parts
from megatron_dms.data.line_error import LineError, require_text
from megatron_dms.data.line_forms import Chat
from megatron_dms.data.template_parts import Part, Place
from megatron_dms.upstream.transformers_chat import render

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the same pattern as transformers'


@dataclass
class Rendered:
    """A chat as text."""

    chat: Chat
    text: str
    spans: list[tuple[int, int]] | None
    """What the template marks with {% generation %}, in characters; None for a template without markers."""
    parts: list[Part]
    places: list[Place] | None
    """Where each part stands in the text (a part that is not there has an empty place); None where the
    marks changed what the template does, so that places cannot be told."""
    left_out: list[str]
    """Names of strings that the template leaves out and that say nothing."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers; its chat_template is read at each call.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known_tails: dict[str, str] = {}
        """What the template writes after a turn, by the name of the turn's last string."""
        self._generation_prompts: dict[str, str] = {}

    @property
    def closing_ids(self) -> frozenset[int]:
        """The tokens that may close a turn: all that the tokenizer knows as a whole."""
        return frozenset((*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder))

    def closing(self, text: str) -> int:
        """Return where the last token that may close a turn ends in a text; 0 if there is none."""
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.closing_ids))
        return max(
            (at + len(token) for token in tokens if token and (at := text.rfind(token)) >= 0), default=0
        )

    def render(self, chat: Chat) -> Rendered:
        """Render a chat.

        Raises:
            LineError: there is no template, it fails on this chat, or it leaves out something.
        """
        if not self.tokenizer.chat_template:
            raise LineError(
                "found chat messages but a tokenizer without chat template; give --chat-template FILE"
            )
        try:
            return self._render(chat)
        except LineError:
            # A few templates (DeepSeek's) look for a call of a tool where the content is null, not empty.
            nulls = [{**m, "content": None} if m["content"] == "" else m for m in chat.messages]
            if nulls == chat.messages:
                raise
            try:
                return self._render(Chat(nulls, chat.targets, chat.tools, chat.documents, chat.options))
            except LineError:
                pass
            raise

    def _render(self, chat: Chat) -> Rendered:
        has_markers = _GENERATION_MARKER.search(self._template(chat)) is not None
        text, spans = self._call(chat, chat.messages, with_spans=has_markers)
        require_text(text, "the rendered chat")
        parts, found, left_out = self._places(chat, text)
        for name in template_parts.parameter_names(chat.tools):
            if name not in text:
                raise _lost(Part(template_parts.TOOLS, "tools.parameters", "", name, "", True), chat)
        return Rendered(chat, text, spans if has_markers else None, parts, found, left_out)

    def _places(self, chat: Chat, text: str) -> tuple[list[Part], list[Place] | None, list[str]]:
        """Find every part. Return the parts, their places if they can be told, and the names of missing ones.

        Raises:
            LineError: a part that says something is missing.
        """
        twin, parts = self._twin(chat, chat.messages)
        if len(parts) > template_parts.LIMIT:
            lost = [part for part in parts if not template_parts.contained(text, part)]
            return parts, None, _left_out(lost, chat)
        try:
            plain, places = self._located(chat, twin, parts)
        except LineError:  # the template refuses the marks
            plain, places = "", [None] * len(parts)
        missing = [k for k, place in enumerate(places) if place is None]
        if plain != text:
            # The marks changed what the template does. Each such part is looked for alone.
            missing = [k for k in missing if not self._alone(chat, parts, k, text)]
            return parts, None, _left_out([parts[k] for k in missing], chat)
        left_out = _left_out([parts[k] for k in missing], chat)
        return parts, [place or Place(0, 0, 0) for place in places], left_out

    def _alone(self, chat: Chat, parts: list[Part], k: int, text: str) -> bool:
        """Whether a part is in the text when it alone bears marks."""
        try:
            plain, places = self._located(chat, self._twin(chat, chat.messages, only=k)[0], parts)
        except LineError:
            return template_parts.contained(text, parts[k])
        return places[k] is not None or (plain != text and template_parts.contained(text, parts[k]))

    def _twin(
        self, chat: Chat, messages: list[dict[str, Any]], only: int | None = None
    ) -> tuple[dict[str, Any], list[Part]]:
        """Return the chat with marks, and its parts."""
        given = {"messages": messages, "tools": chat.tools, "documents": chat.documents}
        return template_parts.mark(given, only)

    def _located(
        self, chat: Chat, twin: dict[str, Any], parts: list[Part], **options: bool
    ) -> tuple[str, list[Place | None]]:
        """Render a chat with marks. Return the text without marks, and the place of each part."""
        marked, _ = self._call(
            chat, twin["messages"], tools=twin.get("tools"), documents=twin.get("documents"), **options
        )
        return template_parts.locate(marked, parts)

    def prompt(self, chat: Chat, count: int) -> str:
        """Return what a server gives the model before it says message `count`."""
        return self._call(chat, chat.messages[:count], add_generation_prompt=True)[0]

    def beginning(self, chat: Chat, count: int) -> str:
        """Return the first `count` messages as text."""
        return self._call(chat, chat.messages[:count])[0]

    def tail(self, rendered: Rendered, k: int, **options: bool) -> str | None:
        """Return what the template writes after the last string of a chat that message k ends.

        Args:
            options: add_generation_prompt.
        """
        twin, parts = self._twin(rendered.chat, rendered.chat.messages[: k + 1])
        text, places = self._located(rendered.chat, twin, parts, **options)
        ends = [place.end for place in places if place]
        return text[max(ends) :] if ends else None

    def generation_prompt(self, chat: Chat) -> str:
        """Return what the template writes before the model speaks, or "" if that cannot be told."""
        key = json.dumps([bool(chat.tools), chat.options], sort_keys=True)
        if key not in self._generation_prompts:
            self._generation_prompts[key] = self._generation_prompt(chat)
        return self._generation_prompts[key]

    def _generation_prompt(self, chat: Chat) -> str:
        asked = [{"role": "user", "content": "?"}]
        try:
            before = self._call(chat, asked)[0]
            after = self._call(chat, asked, add_generation_prompt=True)[0]
        except LineError:
            return ""
        return after[len(before) :] if after.startswith(before) else ""

    def _template(self, chat: Chat) -> str:
        try:
            template = self.tokenizer.get_chat_template(None, chat.tools)
        except ValueError as error:
            raise LineError(
                f"found no chat template that is the default one ({_short(error)}); give --chat-template FILE"
            ) from error
        assert isinstance(template, str)
        return template

    def _call(
        self, chat: Chat, messages: list[dict[str, Any]], with_spans: bool = False, **given: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError

        given = {**chat.options, "tools": chat.tools, "documents": chat.documents, **given}
        try:
            return render(self.tokenizer, messages, self._template(chat), with_spans, **given)
        except LineError:
            raise
        except TemplateSyntaxError as error:
            raise LineError(
                f"found a chat template that is no Jinja ({_short(error)}); mend it, or give "
                "--chat-template FILE"
            ) from error
        except UndefinedError as error:
            raise _failed(error) from error
        except TemplateError as error:
            raise LineError(
                f"the chat template refuses these messages: {_short(error)}; mend them"
            ) from error
        except Exception as error:  # a template is a program, and runs into whatever Python raises
            raise _failed(error) from error


def _failed(error: Exception) -> LineError:
    return LineError(
        f"found a chat template that fails on the types of this line ({type(error).__name__}: "
        f"{_short(error)}), expected messages that the template takes; mend the line "
        "(arguments of a call as an object or as text, content as text), or give --chat-template FILE"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _left_out(missing: list[Part], chat: Chat) -> list[str]:
    """Return the names of missing parts that say nothing.

    Raises:
        LineError: one of them says something.
    """
    for part in missing:
        if part.must:
            raise _lost(part, chat)
    return [
        part.name if part.message == template_parts.TOOLS else f"{part.name} of messages" for part in missing
    ]


def _lost(part: Part, chat: Chat) -> LineError:
    whole = part.lead + part.core + part.trail
    sample = json.dumps(whole if len(whole) <= 40 else f"{whole[:40]}…", ensure_ascii=False)
    field = part.name.split(".")[0]
    where, role = "beside the messages", ""
    if part.message != template_parts.TOOLS:
        role = chat.messages[part.message]["role"]
        where = f"message {part.message} (role {role[:40]})"
    drop = "leave the message out of the line" if field == "content" else f"--drop-field {field}"
    if field == "content" and role == "assistant":
        drop = "leave one assistant message per line"
    thoughts = " (thoughts up to </think>, mostly)" if field == "content" and role == "assistant" else ""
    return LineError(
        f"{where}: found a chat template that leaves out part of {part.name}, {sample}{thoughts}, expected "
        f"all of it in the text; give --chat-template FILE with one that keeps it, or {drop}"
    )
