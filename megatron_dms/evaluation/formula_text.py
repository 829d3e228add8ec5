r"""Clean the text of a mathematical answer: what only changes its looks goes, and words are marked.

After `cleaned`, a formula is LaTeX without styles, sizes and spacing commands; words of \text{...} are
written `\word{cm}`; thousands have no separators. `plain` is the text by which an answer is compared that
cannot be read as a formula.
"""

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒", "-"),
    **dict.fromkeys("×", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "√": r"\root ",
    "∛": r"\sqrt[3]",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "˚": r"^\circ ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "…": r"\ldots ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "θ": r"\theta ",
    "€": "",
    "£": "",
    "¥": "",
    "¢": r"\word{cents}",
    "\u200b": "",
    "\u2062": "",
    "\ufeff": "",
}
_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # braces up to four deep
_SIZES = re.compile(r"\\(?:left|right|middle)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])")
_LENGTHS = re.compile(
    r"\\(?:hspace|vspace|hskip|mkern|mskip|kern)\*?\s*(?:\{[^{}]*\}|-?[\d.]+\s*(?:pt|em|ex|mu|cm|mm|in))"
)
_DROPPED = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|mathstrut|strut|centering|"
    r"bf|bfseries|rm|it|itshape|sf|tt|sl|sc|em|cal|normalfont|boldmath|unboldmath|tiny|scriptsize|"
    r"footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|hfill|nonumber|notag|par|noindent|null|"
    r"relax|protect|allowbreak|nobreak)(?![A-Za-z])"
)
_SPACES = re.compile(r"\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|negthinspace|enskip|newline)\b")
_COLOURS = re.compile(
    r"\\(?:textcolor|color|colorbox)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|\\fcolorbox(?:\{[^{}]*\}){2}"
)
_ASIDE = re.compile(r"\\(?:tag\*?|label|phantom|hphantom|vphantom|ref|rule(?:\{[^{}]*\})?)\s*" + _GROUP)
_STYLED = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathtt|mathnormal|mathscr|mathfrak|boldsymbol|bm|pmb|bold|underline|"
    r"ensuremath|boxed|fbox|framebox|smash|mathord|mathop|mathbin|mathrel|mathclose|mathopen|displaylines|"
    r"uline|Large|large|huge)\s*(?=\{)"
)
_UPRIGHT = re.compile(
    r"\\(?:text|textrm|textbf|textit|textsf|texttt|textnormal|textup|textmd|textsl|textsc|emph|mbox|hbox|"
    r"mathrm|operatorname\*?)\s*" + _GROUP
)
_ONE_UPRIGHT = re.compile(r"\\(?:mathrm|text|mathit|mathbf|mathsf)\s*([A-Za-z0-9])(?![A-Za-z])")
_MARKS = str.maketrans({"$": " ", "`": " "})
_THOUSANDS = re.compile(r"(?<![\d.,\w])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_SPACED = re.compile(r"(?<![\d.,_^}/])(?<![\d,/^_] )[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?/)")
_OPENING, _CLOSING = ("(", "[", r"\{", r"\langle"), (")", "]", r"\}", r"\rangle")
_BRACKETS = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]]")


def cleaned(text: str) -> str:
    """Return the text of an answer without what only changes its looks."""
    text = _unicode(text)
    text = re.sub(r",\s*\\!|\{\s*,\s*\}|\{,\\!\}", "\x00", text)
    text = re.sub(r"(?<=\d)\x00\s*(?=\d{3})", "", text).replace("\x00", ",")
    text = re.sub(r"\\(\(|\)|\[|\])", lambda mark: " ", re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\ ", text))
    text = re.sub(r"\\\\(?![A-Za-z])", "\x01", text)  # a row's end, before \\, is taken for a space
    text = _SPACES.sub(" ", re.sub(r"\\[,;:!>/ \n@]|~|\\$", " ", _LENGTHS.sub(" ", text)))
    text = re.sub(r"^([\s$*{]*)\\\$\s?(-?[\d.,]*\d)(?=[\s$*}.,]*$)", r"\1\2 \\word{dollar}", text)
    text = text.replace(r"\$", "").replace(r"\&", "&").replace(r"\#", "").translate(_MARKS)
    text = re.sub(r"\*\*\s*(?=\S)(.*?)\*\*\s*$", r"\1", text.strip())
    text = _STYLED.sub(" ", _DROPPED.sub(" ", _ASIDE.sub(" ", _COLOURS.sub(" ", _SIZES.sub(" ", text)))))
    text = _ONE_UPRIGHT.sub(r"\\text{\1}", text)
    for _ in range(4):  # \text within \text
        text, found = _UPRIGHT.subn(lambda match: _words(match[1]), text)
        if not found:
            break
    text = text.replace("\x01", r" \\ ")
    text = re.sub(r"(?<=\d)\s*\{\s*(\\[dtc]?frac\s*(?:\{[^{}]*\}\s*){2})\}", r"\1", text)  # 1{\frac{3}{4}}
    text = _without_ends(re.sub(r"\s+", " ", text))
    return _joined_thousands(text)


def plain(text: str) -> str:
    """Return a cleaned text for a comparison of texts: without spaces, braces of one sign, marks of words."""
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:dots[bcimo]?|cdots)(?![A-Za-z])", r"\\ldots", text)
    text = re.sub(r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\\(?:mid|vert)(?![A-Za-z])", "|", text)
    text = re.sub(r"\\word\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])|(?<=\d) (?=\d)", lambda m: f"{m[1] or ''}\x00", text)
    text = re.sub(r"\s", "", text).replace("\x00", " ")
    text = re.sub(r"(?<![A-Za-z}])\{(\w)\}|(?<=[_^])\{(\w)\}", lambda m: m[1] or m[2], text)
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text).strip(".,;:")
    letters = re.sub(r"[^A-Za-z]", "", text)
    return text.casefold() if len(letters) > 1 and not re.search(r"[\\=^_+*/]", text) else text


def _unicode(text: str) -> str:
    """Write signs of Unicode as LaTeX writes them."""
    for signs, mark in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        for run in sorted(set(re.findall(f"[{''.join(signs)}]+", text)), key=len, reverse=True):
            text = text.replace(run, f"{mark}{{{''.join(signs[sign] for sign in run)}}}")
    return "".join(_SYMBOLS[sign] if sign in _SYMBOLS else _compatible(sign) for sign in text)


def _compatible(sign: str) -> str:
    usual = unicodedata.normalize("NFKC", sign)
    # 1½ is not 11/2.
    return (
        " " + usual.replace("⁄", "/") if unicodedata.decomposition(sign).startswith("<fraction>") else usual
    )


def _words(content: str) -> str:
    """Mark the words of upright text. What is written with digits and signs stays as it is."""
    content = re.sub(r"(?<=[A-Za-z])\.(?=\s|$|[A-Za-z])", "", content)  # sq. cm, p.m.
    content = re.sub(r"\\textsuperscript\s*\{([^{}]*)\}", r"^{\1}", content)
    content = re.sub(
        r"(?<![\\A-Za-z])[A-Za-z]+(?:['’-][A-Za-z]+)*", lambda word: rf"\word{{{word[0]}}}", content
    )
    return f" {content} "


def _without_ends(text: str) -> str:
    """Drop what stands around an answer: full stops, commas, quotes, a pair of braces."""
    while True:
        before = text
        text = text.strip().strip("\"'“”").strip()
        text = re.sub(r"(?:[.,;:]|\\\\)+$", "", text)
        text = re.sub(r"^(?:[=:,;]|\\\\|\.(?!\d))+", "", text)
        if text.startswith("{") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, sign in enumerate(re.sub(r"\\[{}]", "  ", text)):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _joined_thousands(text: str) -> str:
    """Take separators out of 58,500 and 70 000; (1,234) is a pair, and 1, 234 two numbers."""
    text = _SPACED.sub(lambda number: number[0].replace(" ", ""), text)
    depths, depth, last = [], 0, 0
    for bracket in _BRACKETS.finditer(text):
        depths += [depth] * (bracket.start() - last)
        last = bracket.start()
        depth += (bracket[0] in _OPENING) - (bracket[0] in _CLOSING)
    depths += [depth] * (len(text) - last)
    return _THOUSANDS.sub(lambda m: m[0] if depths[m.start()] > 0 else m[0].replace(",", ""), text)
