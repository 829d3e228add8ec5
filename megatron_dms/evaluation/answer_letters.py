r"""Find the letter that a generated text gives as its answer to a multiple choice question."""

import re

from megatron_dms.evaluation.answer_text import boxes, last_boxes, visible
from megatron_dms.evaluation.formula_text import cleaned

# Full-width signs, and the quotes of typesetters.
_USUAL = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "“”„«»"), '"')
# The quantifiers are possessive, so runs of stars or spaces are read once and in one way.
_OPEN = (
    r"(?:[*_$(\[{\s`\"‘]|'(?=\w')|\\[(\[{]|\\(?:text\w*+|math\w*+|boldsymbol|bm|underline|boxed|fbox)\s*+\{|"
    r"\\(?:bf|rm|it|displaystyle|large|Large)\b|</?\w+>)*+"
)
_CLOSE = r"(?:[*_$)\]}\s`\"’'.:]|\\[)\]}]|</?\w+>)*+"
_STATED = (
    r"(?i:\b(?:answer|option|choice)[*_]*+\s*+"
    r"(?:(?:is|would be|must be|should be|has to be|will be)\b\s*+:?|[:=])"
    r"[*_\s>-]*+(?:not\s+\W?\w\W?,?\s+but\s+(?:rather\s+)?)?"
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\b:?\s*+)?)"
)
_CHOSEN = (
    r"(?i:\bi(?:'d|'ll| would| will| shall)? (?:choose|pick|select|go with|opt for)\s+"
    r"(?:(?:option|choice)\b\s*+)?)"
)
_TAG = r"(?i:<(?:answer|final_answer|choice)>)"


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    r"""Return the letter that a text gives as its answer; only capitals count, and thoughts do not.

    Explicit statements come first: \boxed{C}, "the answer is (C)", "Answer: **C**", <answer>C</answer>,
    "(C) is the correct answer"; the last statement wins, and several boxes with different letters are no
    answer. Without a statement, the answer is the last letter that stands alone in bold (**C**, **(C) 42**)
    or on a line of its own, or the only letter that begins a line, if that line is the last ("(C) 42").
    Styles, quotes, brackets and tags around the letter are ignored. "A" followed by a word is the article; a
    letter followed by "or B" or "and B" is not a choice.
    """
    text = visible(text).translate(_USUAL)
    one = rf"([{re.escape(letters)}])"
    several = rf"(?:\W*\s(?:or|and)\W+(?:(?i:option|choice)\s+)?|\s*[/&]\s*\W?|,\s*\W?)[{re.escape(letters)}]"
    letter = rf"{one}(?![\w+-]|['’]\w)(?![ \t]+(?!because\b|since\b|as\b)(?<=A[ \t])\w)"
    letter += rf"(?!{several}\b(?!\s+(?:is|was)\b))"
    stated = [
        (found.start(), found[1])
        for form in (_STATED + _OPEN + letter, _TAG + _OPEN + letter)
        for found in re.finditer(form, text)
    ]
    right = (
        r"\s+is\s+(?:therefore\s+|thus\s+|indeed\s+)?the\s+(?:correct|right|best)\s+(?:answer|option|choice)"
    )
    named = (
        rf"(?:(?i:\b(?:option|choice|answer)\s+)[*(\"'`]*{one}|\({one}\))[*)\"'`]*\s+is\s+(?:correct|right)\b"
    )
    for found in re.finditer(rf"(?<![\w'’*(\"`$])[*(\"'`$]*+{one}[*)\"'`$]*+{right}|{named}", text):
        stated.append((found.start(), found[1] or found[2] or found[3]))
    group = [_in_box(content, letter) for content in last_boxes(text)]
    for start, _, content in boxes(text):
        if inside := _in_box(content, letter):
            stated.append((start, inside))
    if stated:
        start, chosen = max(stated)
        several_boxes = len(set(group)) > 1 and boxes(text)[-1][0] <= start
        return None if several_boxes else chosen
    chosen_by_name = re.findall(_CHOSEN + _OPEN + letter, text)
    if chosen_by_name:
        return str(chosen_by_name[-1])
    opened, closed = (wrapper.replace(r"\s", r" \t") for wrapper in (_OPEN, _CLOSE))  # of one line
    alone = rf"\*\*[ \t]*+\(?{letter}(?:[).:][^*\n]*+)?\*\*|^{opened}{letter}{closed}$"
    found_alone = [match[1] or match[2] for match in re.finditer(alone, text, re.MULTILINE)]
    return found_alone[-1] if found_alone else _last_line(text, letter)


def _in_box(content: str, letter: str) -> str | None:
    """Return the letter of a box that may hold the option's text, too: "(C) 42", "C. 42", "C - Paris", but
    not a formula such as C_5 or C+1."""
    plain = re.sub(r"\\word\{([^{}]*)\}", r"\1", cleaned(content))
    named = r"(?i:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)?\s*(?:is\b)?[\s:]*)"
    after = r"(?:$|\s*[).:\]},;]|\s+-{1,3}\s*[A-Za-z]{2}|\s+\(?\d|\s+[A-Za-z]{2})"
    inside = re.match(rf"{named}{_OPEN}{letter}[*_\"'`]*{after}", plain)
    return inside[1] if inside else None


def _last_line(text: str, letter: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    form = rf"[ \t*]*(?:\({letter}\)|{letter}[).:])[ \t*]"
    begun = [match for line in lines if (match := re.match(form, line))]
    if len(begun) != 1 or begun[0].string != lines[-1]:
        return None
    return begun[0][1] or begun[0][2]
