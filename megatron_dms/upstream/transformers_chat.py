"""Chat templates, rendered together with the spans of the assistant's turns."""

from typing import Any


def render_with_spans(
    tokenizer: Any, messages: list[dict[str, Any]], template: str
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages through a template that marks what the assistant says with {% generation %}.

    transformers hands out the marked spans through one function only, which is not part of its documented
    interface.

    Args:
        tokenizer: the tokenizer whose special tokens the template may name.

    Returns:
        The text, and the marked spans of it as (first character, one past the last).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # its annotation says str; it returns texts and spans
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    return texts[0], spans[0]
