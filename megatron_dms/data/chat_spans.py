"""Which characters of a rendered chat the model learns to say.

The template's {% generation %} markers tell it. Without them, the places of a message's strings do: the turn
begins after what the template writes before the model speaks, and ends with what the template writes after
the last string of the message, which rendering the chat up to that message shows. So a template may treat the
last turn otherwise (as Qwen3's does, which gives the last answer without thoughts an empty think block), as
long as all turns are in the text as they would be said.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_dms.data.chat_template import ChatTemplate, Rendered
from megatron_dms.data.line_error import LineError
from megatron_dms.data.template_parts import TOOLS

# A block of thoughts without thoughts: <think></think>, [THINK][/THINK], <|think|><|/think|> …
_EMPTY_BLOCK = re.compile(r"\s*([<\[]\|?)([\w:]+)(\|?[>\]])\s*\1/\2\3\s*")


class Span(NamedTuple):
    """One turn of the model, in characters."""

    begin: int
    tail: int
    """Where the template's own words after the turn begin."""
    end: int
    exact: bool
    """Whether the span ends where the model stops; else the template may have gone on, with a newline."""


class _Turn(NamedTuple):
    """Where the strings of one message stand."""

    begin: int
    core: int
    end: int
    before: int
    """Where the strings before end."""
    after: int
    """Where the strings after begin."""
    last: str
    """Name of the last string."""


def spans_of(template: ChatTemplate, rendered: Rendered) -> list[Span]:
    """Return the spans of the messages that are targets.

    Raises:
        LineError: the template does not let tell where a turn begins or ends.
    """
    if rendered.spans is not None:
        return _marked_spans(rendered)
    spans = []
    for k, target in enumerate(rendered.chat.targets):
        if target:
            turn = _turn(rendered, k)
            spans.append(
                _by_prefixes(template, rendered, k) if turn is None else _span(template, rendered, k, turn)
            )
    return spans


def _marked_spans(rendered: Rendered) -> list[Span]:
    """Return the spans that the template marks, without those of messages that are no targets."""
    spans = [Span(begin, end, end, True) for begin, end in rendered.spans or []]
    assistant = [message["role"] == "assistant" for message in rendered.chat.messages]
    if rendered.places is None:
        if rendered.chat.targets != assistant:
            raise LineError(
                "found weights, and a chat template that treats strings by what they say, so that its turns "
                "cannot be told apart; drop the weights, or give --chat-template FILE with another one"
            )
        return spans
    found = sorted(
        (place, part.message)
        for place, part in zip(rendered.places, rendered.parts, strict=True)
        if place.end and part.message != TOOLS and assistant[part.message]
    )
    kept = []
    for span in spans:
        inside = [(place, k) for place, k in found if place.begin < span.end]
        owner = inside[-1][1] if inside else None
        if owner is None or rendered.chat.targets[owner]:
            first = min((place.begin for place, _ in found if place.end > span.begin), default=span.end)
            kept.append(
                span._replace(begin=_after_empty_block(rendered.text, span.begin, min(first, span.end)))
            )
    return kept


def _after_empty_block(text: str, begin: int, first: int) -> int:
    """Return where a turn begins without the empty block of thoughts that a template put before the message.

    first: where the first string of the message begins; an empty block that is part of it is said.
    """
    block = _EMPTY_BLOCK.match(text, begin, first)
    return block.end() if block else begin


def _turn(rendered: Rendered, k: int) -> _Turn | None:
    """Return where the strings of message k stand; None where that cannot be told."""
    if rendered.places is None:
        return None
    places = [place for place in rendered.places if place.end]
    own = [
        (place, part.name)
        for place, part in zip(rendered.places, rendered.parts, strict=True)
        if part.message == k and place.end
    ]
    if not own:
        return None
    first, (end, last) = min(own)[0], max((place.end, name) for place, name in own)
    before = max((place.end for place in places if place.end <= first.begin), default=0)
    after = min((place.begin for place in places if place.begin >= end), default=len(rendered.text))
    return _Turn(first.begin, first.core, end, before, after, last)


def _span(template: ChatTemplate, rendered: Rendered, k: int, turn: _Turn) -> Span:
    begin = _begin(template, rendered, k, turn)
    begin = _after_empty_block(rendered.text, begin, turn.begin)
    follows = rendered.text[turn.end : turn.after]
    if k == len(rendered.chat.messages) - 1:
        return Span(begin, turn.end, len(rendered.text), False)
    # The template writes the same after each answer, and so mostly what it wrote after one of another line.
    known = template.known_tails.get(turn.last, "")
    if known and follows.startswith(known):
        return Span(begin, turn.end, turn.end + len(known), False)
    tail = template.tail(rendered, k)
    if tail is None:
        raise _changed(k)
    if follows.startswith(tail):
        if template.closing(tail):
            template.known_tails[turn.last] = tail
        return Span(begin, turn.end, turn.end + len(tail), False)
    # Some templates close the whole chat with a further token.
    end = template.closing(tail[: _common(tail, follows)])
    if not end:
        raise _changed(k)
    return Span(begin, turn.end, turn.end + end, False)


def _begin(template: ChatTemplate, rendered: Rendered, k: int, turn: _Turn) -> int:
    """Return where the model begins to speak."""
    asked = template.generation_prompt(rendered.chat)
    if asked:
        at = rendered.text.rfind(asked, turn.before, turn.core)
        if at >= 0:
            return at + len(asked)
    if k == 0:
        if asked:
            raise _changed(k)
        return turn.begin
    # A template without such a text, or one that writes another after a tool's message.
    asked = template.tail(rendered, k - 1, add_generation_prompt=True) or ""
    if not rendered.text.startswith(asked, turn.before) or turn.before + len(asked) > turn.core:
        raise _changed(k)
    return turn.before + len(asked)


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _by_prefixes(template: ChatTemplate, rendered: Rendered, k: int) -> Span:
    """Return the span of a message whose strings cannot be found: what each prefix of the chat adds."""
    if k == 0:
        raise _changed(k)
    prompt, turn = template.prompt(rendered.chat, k), template.beginning(rendered.chat, k + 1)
    if not (turn.startswith(prompt) and rendered.text.startswith(turn)):
        raise _changed(k)
    return Span(len(prompt), len(prompt), len(turn), False)


def _changed(k: int) -> LineError:
    return LineError(
        f"message {k}: found a chat template that changes a turn once others follow (by stripping earlier "
        "thoughts, mostly) or prompts for another one, expected each turn to continue its prompt and to "
        "stay; give --chat-template FILE with {% generation %} markers, or leave one assistant message per "
        "line"
    )
