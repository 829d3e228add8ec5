"""Chat templates, rendered together with the spans of the assistant's turns."""

from typing import Any


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    template: str,
    with_spans: bool = False,
    **given: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages through a template.

    transformers hands out the spans that a template marks with {% generation %} through one function only,
    which is not part of its documented interface. The same function takes a content that is null, which
    apply_chat_template drops.

    Args:
        tokenizer: the tokenizer whose special tokens the template may name.
        with_spans: whether the template has the markers.
        given: tools, documents, add_generation_prompt, and further variables of the template.

    Returns:
        The text, and the marked spans of it as (first character, one past the last).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # its annotation says str; it returns texts and spans
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=with_spans,
        **{**tokenizer.special_tokens_map, **given},
    )
    texts, spans = rendered
    return texts[0], spans[0] if with_spans else []
