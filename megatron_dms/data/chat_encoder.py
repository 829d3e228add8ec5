"""One row of input → token ids and a loss mask.

A chat goes through the tokenizer's chat template; a text is tokenised as it stands and closed with the EOS
token. megatron_dms/data/line_forms.py has the forms of rows.

The assistant's part of a chat is found in the rendered text, in characters, and carried over to tokens by the
tokenizer's offsets. transformers' own return_assistant_tokens_mask reads the same {% generation %} markers,
but if the last character of a span belongs to no token (a blank, for a tokenizer that drops blanks), it marks
everything up to the end of the conversation, including the user's turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megatron_dms.data.chat_spans import Span, spans_of
from megatron_dms.data.chat_template import ChatTemplate
from megatron_dms.data.line_error import LineError
from megatron_dms.data.line_forms import Chat, Text, parse

__all__ = ["LOSS_ON", "Document", "DocumentEncoder", "LineError"]

LOSS_ON = ("assistant", "all")


class Document(NamedTuple):
    """One encoded row."""

    ids: np.ndarray
    """[n] int32."""
    mask: np.ndarray
    """[n] uint8; 1 = the token counts as a prediction target."""
    left_out: tuple[str, ...]
    """What of the row is in no token, by name."""


class DocumentEncoder:
    """Encode rows with one tokenizer.

    Args:
        tokenizer: directory of an HF tokenizer (or a hub name).
        loss_on: "assistant" (the assistant's tokens with the end of the turn, or the completion) or "all". In
            rows of text all tokens count.
        chat_template: a Jinja template that replaces the tokenizer's own.
        fields: the columns to read: none (the known forms), one, or a prompt's and a completion's.
        dropped: columns, and fields of messages, to leave out and count.

    Raises:
        ValueError: loss_on is unknown, the tokenizer cannot be loaded, or it cannot tell which characters a
            token came from.
    """

    def __init__(
        self,
        tokenizer: str,
        loss_on: str = "assistant",
        chat_template: str | None = None,
        fields: tuple[str, ...] = (),
        dropped: Iterable[str] = (),
    ) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        if loss_on not in LOSS_ON:
            raise ValueError(f"--loss-on: found {loss_on!r}, expected one of {', '.join(LOSS_ON)}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
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
        self.fields = fields
        self.dropped = frozenset(dropped)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The template of chats."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _closing_ids(self) -> np.ndarray:
        return np.asarray(sorted(self.template.closing_ids), np.int32)

    def encode(self, row: bytes | dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Encode one row: a line of JSON, or the object that a line holds.

        Returns:
            ids [n] int32 and mask [n] uint8 (1 = the token counts as a prediction target).

        Raises:
            LineError: the row is no document, its chat template loses part of it, or its loss mask cannot be
                told.
        """
        ids, mask, _ = self.encode_document(row)
        return ids, mask

    def encode_document(self, row: bytes | dict[str, Any]) -> Document:
        """Encode one row, and say what of the row is in no token.

        Raises:
            LineError: as `encode`.
        """
        parsed = parse(row, self.fields, self.dropped)
        if isinstance(parsed.document, Text):
            ids, mask = self._encode_text(parsed.document)
            return Document(ids, mask, tuple(parsed.left_out))
        return self._encode_chat(parsed.document, parsed.left_out)

    def _encode_text(self, text: Text) -> tuple[np.ndarray, np.ndarray]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise LineError(
                "found a tokenizer without an EOS token, expected one to close the document; set eos_token"
            )
        split = len(text.prompt)
        encoding = self.tokenizer(
            text.prompt + text.completion, return_offsets_mapping=bool(split), verbose=False
        )
        ids = np.asarray(encoding["input_ids"], np.int32)
        mask = np.ones(len(ids), np.uint8)
        if split and self.loss_on == "assistant":
            begin, end = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
            mask = ((end > split) & (end > begin)).astype(np.uint8)
        # Some tokenizers append EOS themselves, to a text that may end with EOS already.
        count = len(ids)
        while count and ids[count - 1] == eos:
            count -= 1
        ids, mask = np.append(ids[:count], np.int32(eos)), np.append(mask[:count], np.uint8(1))
        return self._without_second_bos(ids, mask)

    def _without_second_bos(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keep one BOS at the beginning: tokenizers and templates add one to a text that has one already."""
        bos = self.tokenizer.bos_token_id
        first = 0
        while first + 2 < len(ids) and ids[first] == bos and ids[first + 1] == bos:
            first += 1
        return ids[first:], mask[first:]

    def _encode_chat(self, chat: Chat, left_out: list[str]) -> Document:
        if chat.weighted and self.loss_on == "all":
            raise LineError(
                "found a message of weight 0 and --loss-on all, which counts all messages; give --loss-on "
                "assistant, or --drop-field weight"
            )
        rendered = self.template.render(chat)
        spans = [] if self.loss_on == "all" else spans_of(self.template, rendered)
        # No special tokens: the template writes them into the text.
        encoding = self.tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(encoding["input_ids"], np.int32)
        mask = np.full(len(ids), self.loss_on == "all", np.uint8)
        begin, end = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        for span in spans:
            mask[self._inside(rendered.text, span, ids, begin, end)] = 1
        return Document(*self._without_second_bos(ids, mask), (*left_out, *rendered.left_out))

    def _inside(
        self, text: str, span: Span, ids: np.ndarray, begin: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        """Return the positions of the tokens of a span.

        The model does not say what a template puts after the token that closes a turn (a newline, mostly).
        That token need not be EOS: chats of ChatML end in <|im_end|> under tokenizers whose EOS is another.
        """
        inside = np.flatnonzero((begin < span.end) & (end > span.begin) & (begin < end))
        if span.exact:
            return inside
        closing = np.flatnonzero((begin[inside] >= span.tail) & np.isin(ids[inside], self._closing_ids))
        if closing.size:
            return inside[: closing[-1] + 1]
        tail = text[span.tail : span.end]
        stop = span.tail + (len(tail.rstrip()) or len(tail))
        return inside[begin[inside] < stop]
