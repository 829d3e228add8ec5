"""Messages as chat templates expect messages: roles, contents that are lists of parts, weights.

Templates are written for {"role": …, "content": a string, "reasoning_content": …, "tool_calls": […]}. The
other spellings that public data have become this one here, or are refused by name.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from megatron_dms.data.line_error import LineError, require_text

# ShareGPT's names of speakers.
_ROLES = (
    dict.fromkeys(("human", "user", "prompter"), "user")
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant")
    | dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool")
    | {"system": "system", "developer": "developer", "function_call": "function_call"}
)
# OpenAI and ShareGPT, axolotl, ms-swift: whether the model learns to say a message.
_WEIGHTS = ("weight", "train", "training", "loss")
_PLAIN = {"role", "content"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Parts of a content: which field of the part holds the text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


def checked_list(messages: Any, name: str) -> list[Any]:
    """Return the messages.

    Raises:
        LineError: there is no list of messages, or an empty one.
    """
    if not isinstance(messages, list) or not messages:
        raise LineError(
            f"{name}: found {type(messages).__name__ if messages != [] else 'an empty list'}, expected a "
            "list of {role, content}; mend or delete the line"
        )
    return messages


def as_messages(
    given: list[Any], dropped: frozenset[str], left_out: list[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Bring messages into the one form of templates.

    Args:
        dropped: names of fields to leave out of all messages.
        left_out: gets the names of what goes into no token.

    Returns:
        The messages without fields that are null, which templates would print as "None"; and for each message
        whether the message counts, which is so unless its weight is 0.

    Raises:
        LineError: a message has no role, no text, or something that no template takes.
    """
    messages, counts = [], []
    for k, message in enumerate(given):
        if not isinstance(message, dict):
            raise LineError(
                f'message {k}: found no "role", expected {{role, content}}; mend or delete the line'
            )
        if (
            message.keys() == _PLAIN
            and isinstance(message["role"], str)
            and isinstance(message["content"], str)
        ):
            require_text(message["content"], f'"content" of message {k}')  # most messages: no time to lose
            messages.append(message)
            counts.append(True)
            continue
        left_out += [f"{name} of messages" for name in dropped & message.keys() if message[name] is not None]
        fields = {key: value for key, value in message.items() if value is not None and key not in dropped}
        fields = _with_role(fields, k)
        weight = _weight(fields, k)
        _flatten(fields, k, left_out)
        _join_old_call(fields)
        _name_thoughts_once(fields)
        left_out += [f"{name} of messages" for name, value in fields.items() if not _has_text(value)]
        says_more = bool(fields.get("tool_calls")) or any(fields.get(name) for name in _REASONING)
        if "content" not in fields and says_more:
            fields["content"] = ""
        require_text(fields.get("content"), f'"content" of message {k}')
        messages.append(fields)
        counts.append(weight)
    return messages, counts


def _with_role(fields: dict[str, Any], k: int) -> dict[str, Any]:
    """Return the fields with role and content in place of ShareGPT's from and value."""
    if "role" not in fields and isinstance(speaker := fields.get("from"), str):
        role = _ROLES.get(speaker)
        if role is None:
            raise LineError(
                f'message {k}: found "from": "{speaker[:40]}", expected one of {", ".join(_ROLES)}; '
                "rename the speaker"
            )
        rest = {key: value for key, value in fields.items() if key not in ("from", "value")}
        fields = {"role": role} | ({"content": fields["value"]} if "value" in fields else {}) | rest
        if role == "function_call":
            calls = _call_of_text(fields.pop("content", None), k)
            fields |= {"role": "assistant", "tool_calls": calls}
    if not isinstance(fields.get("role"), str):
        raise LineError(f'message {k}: found no "role", expected {{role, content}}; mend or delete the line')
    return fields


def _call_of_text(text: Any, k: int) -> list[dict[str, Any]]:
    """Return the tool calls that a ShareGPT message of function_call holds as JSON."""
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not (
        isinstance(calls, list) and calls and all(isinstance(call, dict) and "name" in call for call in calls)
    ):
        raise LineError(
            f"message {k}: found a function_call that is no JSON, expected name and arguments; mend the line"
        )
    return [{"type": "function", "function": call} for call in calls]


def _join_old_call(fields: dict[str, Any]) -> None:
    """Read calls that are written as JSON, and write OpenAI's former function_call as a call of a tool."""
    if isinstance(fields.get("tool_calls"), str):
        with suppress(ValueError, RecursionError):
            fields["tool_calls"] = json.loads(fields["tool_calls"])
    if not fields.get("tool_calls", True):  # an empty list, as columns of all messages have
        del fields["tool_calls"]
    if isinstance(fields.get("function_call"), dict) and "tool_calls" not in fields:
        fields["tool_calls"] = [{"type": "function", "function": fields.pop("function_call")}]


def _has_text(value: Any) -> bool:
    """Whether a value holds a string, which has to reach the tokens; numbers cannot be looked for there."""
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def _name_thoughts_once(fields: dict[str, Any]) -> None:
    """Keep one of several equal copies of the thoughts, which some servers write under two names."""
    names = [name for name in _REASONING if name in fields]
    for name in names[1:]:
        if fields[name] == fields[names[0]]:
            del fields[name]


def _weight(fields: dict[str, Any], k: int) -> bool:
    """Take the weight out of a message; return whether it is 1, or not given."""
    found = [
        (name, fields.pop(name)) for name in _WEIGHTS if isinstance(fields.get(name), bool | int | float)
    ]
    for name, weight in found:
        if weight not in (0, 1):
            raise LineError(
                f'message {k}: found "{name}": {weight}, expected 0 or 1, because a token is a target or is '
                "none; round it"
            )
    return all(weight for _, weight in found)


def _flatten(fields: dict[str, Any], k: int, left_out: list[str]) -> None:
    """Join a content that is a list of parts: texts by line ends, as servers do; thoughts go beside them."""
    content = fields.get("content")
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if kind in _TEXT_PARTS:
            target, name = texts, _TEXT_PARTS[kind]
        elif kind in _THOUGHT_PARTS and fields["role"] == "assistant":
            target, name = thoughts, _THOUGHT_PARTS[kind]
        else:
            raise LineError(
                f'"content" of message {k}: found list with a part of type {str(kind)[:40]}, expected '
                "parts of type text; delete the line, or write what the part says as text"
            )
        text = part.get(name)
        if isinstance(text, list):  # Mistral's thoughts are lists of texts themselves
            text = "\n".join(
                str(item.get("text", "")) if isinstance(item, dict) else str(item) for item in text
            )
        if text is None:
            raise LineError(
                f'"content" of message {k}: found list with a part without "{name}", expected a '
                "text; mend the line"
            )
        require_text(text, f'"content" of message {k}')
        target.append(text)
        left_out += [f"{key} of parts" for key in part if key not in ("type", name) and part[key] is not None]
    if thoughts and any(fields.get(name) for name in _REASONING):
        raise LineError(
            f"message {k}: found thoughts in the content and beside it, expected one; mend the line"
        )
    if thoughts:
        fields["reasoning_content"] = "\n".join(thoughts)
    fields["content"] = "\n".join(texts)
