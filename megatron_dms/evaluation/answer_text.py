r"""Find where a generated text says its answer: after its thoughts, and in its last box or boxes.

Throughout, None means "no answer".
"""

import re

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{)|\\[{}]|[{}]")
# \boxed 72: TeX takes one digit, but the whole number is meant.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?!\s*\{)(?:\\?\$)?(-?[\d,]*\d(?:\.\d+)?|[A-Za-z](?![A-Za-z]))"
)
_THOUGHTS = re.compile(
    r"(?P<open><(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|seed:think)>|\[THINK\]|"
    r"<\|(?:begin_of_thought|START_THINKING|thinking)\|>|◁think▷|<unused94>)|"
    r"(?P<close></(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|seed:think)>|\[/THINK\]|"
    r"<\|(?:end_of_thought|END_THINKING|/thinking)\|>|◁/think▷|<unused95>)",
    re.IGNORECASE,
)
# What may stand between boxes that are one answer together: "and", commas, the signs around formulas, x =.
_WORDS = (
    r"(?:\\text\w*\s*\{\s*(?:,?\s*(?:and|or|or\s+else|as\s+well\s+as))?[\s,]*\}|"
    r"\band\b|\bor\b|\bas well as\b)"
)
_JOIN = re.compile(
    rf"(?:{_WORDS}|\bboth\b|^\s*+(?:[-*]|\(?[a-d\d]\d*[.)])\s|\(?[a-d]\)\s|[\s,;$&*~]|"
    r"\\(?:\(|\)|\[|\]|\\|quad\b|qquad\b|[,;:! ]))*+",
    re.MULTILINE,
)
_JOINS = re.compile(rf"{_WORDS}|[,;&]|\\q?quad\b|\\\\|^\s*[-*]\s|^\s*\(?[a-d\d]+[.)]\s", re.MULTILINE)
_ASSIGNED = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*(?:\$|\\\(|\\\[|\s)*$")


def visible(text: str) -> str:
    """Return a text without its thoughts.

    Thoughts that were never closed go to the end of the text: it was cut off within them. Thoughts that were
    not opened begin with the text: the chat template opened them.
    """
    kept: list[str] = []
    depth, end = 0, 0
    for tag in _THOUGHTS.finditer(text):
        if tag["open"]:
            if depth == 0:
                kept.append(text[end : tag.start()])
            depth += 1
        else:
            if depth == 0:
                kept.clear()
            depth = 0
            end = tag.end()
    return "".join(kept) if depth else "".join([*kept, text[end:]])


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends within thoughts: then a text that goes on begins in them, without a tag."""
    tags = list(_THOUGHTS.finditer(prompt))
    return bool(tags) and tags[-1]["open"] is not None and not prompt[tags[-1].end() :].strip()


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Return start, end and content of every complete box, sorted by start.

    The text is read in one pass: text that went wrong may repeat a box very often.
    """
    found: list[tuple[int, int, str]] = []
    opened: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text):
        if brace["box"] or brace[0] == "{":
            opened.append(brace)
        elif brace[0] == "}" and opened:  # \{ and \} do not nest
            opening = opened.pop()
            if opening["box"]:
                content = text[opening.end() : brace.start()].strip()
                found.append((opening.start(), brace.end(), content))
    found += [(bare.start(), bare.end(), bare[1]) for bare in _BARE_BOX.finditer(text)]
    return sorted(found)


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{...} or \fbox{...}, stripped; braces may be nested.

    Of several boxes only the last one counts, even if it is empty (""). A box that is never closed does not
    count, for example where the text was cut.
    """
    found = boxes(text)
    return found[-1][2] if found else None


def last_boxes(text: str) -> list[str]:
    r"""Return the contents of the boxes at the end that are one answer together: \boxed{1} and \boxed{2}.

    Only commas, "and", "or" and signs around formulas may stand between them, and the same "x =" before
    them. Boxes of equal content count once. Empty if there is no box.
    """
    all_boxes = boxes(text)
    found = [box for index, box in enumerate(all_boxes) if not _holds_box(all_boxes, index)]
    if not found:
        return []
    group = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : group[0][0]]
        if len(between) > 200:
            break
        name = _ASSIGNED.search(between)
        if name:
            before = _ASSIGNED.search(text[max(box[0] - 40, 0) : box[0]])
            if before is None or before[1] != name[1]:
                break
            between = between[: name.start()]
        same = box[2] == group[0][2]
        if not _JOIN.fullmatch(between) or not (same or _JOINS.search(between)):
            break
        group.insert(0, box)
    return list(dict.fromkeys(content for _, _, content in group))


def _holds_box(found: list[tuple[int, int, str]], index: int) -> bool:
    return index + 1 < len(found) and found[index + 1][0] < found[index][1]
