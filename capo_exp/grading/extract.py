"""Where the answer stands in a text; math-verify is imported when one is looked for outside a box."""

import re
from functools import cache
from typing import Any

from capo_exp.grading.reading import Answer, read_formula

_ANSWER_IS = re.compile(
    r"(?i)\b(?:answer|correct (?:option|choice))\b(?:[^.\n:=]{0,60}?\b(?:is|are)\b\s*:?|[*_]*\s*[:=])"
    r"[*_\s]*|^(?:#+[^\n]{0,40}\banswer\b[^\n]*|[*_]*(?:final )?answer[*_]*)\n+",
    re.MULTILINE,
)
_WORDS = re.compile(r"(?!(?:and|or)\b)\b[A-Za-z]{2,}")
_VERDICTS = ("right", "correct", "wrong", "incorrect")  # a completion that says "the answer is right"
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_ASSIGNMENT = re.compile(r"\s*[A-Za-z]\w*\s*=")
_MINUS = re.compile(r"(?:=|\$|\\\()\s*-\s*\\+f?box(?:ed)?\s*$")  # a = -\boxed{256}
_LETTER = re.compile(r"(?:option |choice )?\(?([A-J])(?:\)|[.:,](?=\s|$)|$|(?= (?:because|since)\b))")


def read_answer(text: str, style: str) -> Answer | None:
    """Reads the answer of a completion: the last box, else what the style declares; see compare.grade."""
    box = find_last_box(text)
    if box is not None:
        return read_formula("-" * has_minus(text, box) + box, malformed=style != "boxed")
    if style == "gsm8k":
        return _after_hashes(text)
    if style == "final_answer":
        return _after_answer_is(text)
    if style == "boxed":
        return _announced(text, style)
    text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])|`+", "", text)  # bold, not 2**3
    if choice := re.fullmatch(r"\s*\(?([A-J])(?:\)[^\n]*|\.)?\s*", text):
        return read_formula(choice[1])
    return _announced(text, style) or _after_answer_is(text) or _anywhere(text)


def has_minus(text: str, box: str) -> bool:
    r"""Returns whether a minus stands before the last box, as in $a = -\boxed{256}$."""
    began = text.rindex(f"{{{box}}}")
    return _MINUS.search(text[max(0, began - 40) : began]) is not None


def read_boxes_side_by_side(text: str, style: str) -> Answer | None:
    """Joins boxes as math-verify does: those with few characters and a separator between them."""
    from latex2sympy2_extended.math_normalization import extract_boxed_content

    if text.count(r"\boxed") < 2 or find_last_box(text) is None:
        return None
    return read_formula(extract_boxed_content(text, "last"), malformed=style != "boxed")


def _after_hashes(text: str) -> Answer | None:
    _, marker, rest = text.rpartition("####")
    return _declared(rest.strip()[:1000].partition("\n")[0]) if marker else None


def _after_answer_is(text: str) -> Answer | None:
    for match in reversed(list(_ANSWER_IS.finditer(text))[-5:]):  # "..., so the answer is right." has none
        answer = _declared(text[match.end() :][:1000])
        if answer is not None:
            return answer
    return None


def _declared(text: str) -> Answer | None:
    """Reads one formula without dollar signs, a choice, or a sentence that begins with the answer."""
    text = re.split(r"\n\s*\n|\.(?!\S)", text)[0].strip(" \t\r\n*_`")
    text = re.sub(r"\\?\$", "", text) if text.count("$") == 1 else text  # a currency
    text = re.sub(r"^[\d\s+*/().,-]+=\s*", "", text)  # 80 + 150 = 230 miles
    delimited = any(mark in text for mark in ("$", r"\(", r"\["))
    words = _WORDS.findall(_COMMANDS.sub(" ", text))
    if (letter := _LETTER.match(text)) and not delimited:
        return read_formula(letter[1])
    if text and not delimited and (not words or words == [text]):
        text = re.sub(r"(?<=\d) [a-z]$", "", text)  # outside of LaTeX a letter after a space is a unit
        return None if text.lower() in _VERDICTS else read_formula(text)
    sentence = f"The final answer is {text}"
    return _announced(sentence, "auto") or _anywhere(sentence) if text else None


def _announced(text: str, style: str) -> Answer | None:
    r"""Reads the formula after "final answer is" or "answer", as math-verify finds it."""
    found = _find(text, extraction_config=[_announcement(style)], extraction_mode="first_match")
    return _from_found(found, style)


def _anywhere(text: str) -> Answer | None:
    """Reads by the library's defaults: a number or formula wherever it stands."""
    return _from_found(_find(text), "auto")


def _from_found(found: list[Any], style: str) -> Answer | None:
    """Reads what math-verify found: its text, with the percent sign that stood behind it."""
    from math_verify.grader import get_pct_val

    if not found:
        return None
    text = next((item for item in reversed(found) if isinstance(item, str)), "")
    *others, last = text.split(" and ")
    if others and _ASSIGNMENT.match(last) and not any(map(_ASSIGNMENT.match, others)):
        text = last  # $5x = 30$ and $x = 6$
    percent = get_pct_val(found[0]) is not None and not text.endswith("%")
    return read_formula(text + r"\%" * percent, malformed=style != "boxed")


def _find(text: str, **options: Any) -> list[Any]:
    """Calls math_verify.parse without its time-out, a Python signal that C code and threads do not obey."""
    from math_verify import parse

    return parse(text, parsing_timeout=None, **options)  # pyright: ignore[reportArgumentType]


@cache
def _announcement(style: str) -> Any:
    """Returns what counts as an announced formula."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig

    rules = NormalizationConfig(malformed_operators=style != "boxed", boxed="all")
    return LatexExtractionConfig(
        normalization_config=rules, boxed_match_priority=0, try_extract_without_anchor=False
    )


_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\(?!f?box)[\s\S]|[{}]")


def find_last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} or \fbox{...} whose braces balance and that holds
    something, for a prompt that is repeated says "within \boxed{}"; None if there is none. One pass."""
    starts = [place for place in (text.find(r"\boxed"), text.find(r"\fbox")) if place >= 0]
    open_braces, found = [], (-1, -1)
    for token in _BRACES.finditer(text, min(starts)) if starts else ():
        if token.group() == "}":
            began = open_braces.pop() if open_braces else -1
            if began > found[0] and text[began : token.start()].strip():
                found = (began, token.start())
        elif token.group()[-1] == "{" and token.group() != r"\{":  # \{ and \} are text, not braces
            open_braces.append(token.end() if len(token.group()) > 1 else -1)
    return text[found[0] : found[1]] if found[0] >= 0 else None
