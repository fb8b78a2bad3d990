"""Where the answer stands in a text, and how math-verify reads it; imports that only when it is needed."""

import logging
import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any


@dataclass(frozen=True)
class Answer:
    found: tuple[Any, ...]
    """math-verify's reading: expression and text, or only one of them."""
    percent: bool = False
    """Says whether a percent sign at the end was dropped."""

    @property
    def text(self) -> str:
        """Returns the matched text. Never str() of an expression: that can take for ever."""
        return next((item for item in reversed(self.found) if isinstance(item, str)), "")


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Answer | None:
    """Reads a gold answer: a formula alone, with or without $...$ around it."""
    formula = _as_formula(gold)
    return _first_match(formula, "gold") or _anywhere(formula)


def gold_has_text(gold: str) -> bool:
    """Returns whether read_gold finds at least text, without the parser where that is sure: in a formula on
    its own. What math-verify cannot parse it keeps as text."""
    from latex2sympy2_extended.math_normalization import normalize_latex

    formula = _as_formula(gold)[1:-1]
    unsure = not formula or re.search(r"[$\n]|\\boxed|\\$", formula)
    if not unsure and normalize_latex(formula, _extraction_targets()["gold"].normalization_config):
        return True
    return read_gold(gold) is not None


def read_answer(text: str, style: str) -> Answer | None:
    """Reads the answer of a completion: the last box, else what the style declares; see compare.grade."""
    box = find_last_box(text)
    if box is not None and box.strip():
        return _in_box(box, style)
    if style == "gsm8k":
        return _after_hashes(text)
    if style == "final_answer":
        return _after_answer_is(text)
    found = _first_match(text, style)
    return found or _anywhere(text) or _after_answer_is(text) if style == "auto" else found


def _in_box(content: str, style: str) -> Answer | None:
    return _first_match(rf"\boxed{{{_tidy(content)}}}", style)


def read_boxes_side_by_side(text: str, style: str) -> Answer | None:
    """Joins boxes as math-verify does: those with few characters and a separator between them."""
    from latex2sympy2_extended.math_normalization import extract_boxed_content

    if text.count(r"\boxed") < 2 or find_last_box(text) is None:
        return None
    return _in_box(extract_boxed_content(text, "last"), style)


def _after_hashes(text: str) -> Answer | None:
    _, marker, rest = text.rpartition("####")
    return _declared(rest.strip()[:1000].partition("\n")[0]) if marker else None


def _after_answer_is(text: str) -> Answer | None:
    for match in reversed(list(_ANSWER_IS.finditer(text))[-5:]):  # "..., so the answer is right." has none
        answer = _declared(text[match.end() :][:1000])
        if answer is not None:
            return answer
    return None


_ANSWER_IS = re.compile(r"(?i)\banswer\b(?:[^.\n:=]{0,60}?\b(?:is|are)\b\s*:?|[*_]*\s*[:=])[*_\s]*")
_WORDS = re.compile(r"(?!(?:and|or)\b)\b[A-Za-z]{2,}")
_VERDICTS = ("right", "correct", "wrong", "incorrect")  # a completion that says "the answer is right"
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")


def _declared(text: str) -> Answer | None:
    """Reads one formula without dollar signs, or a sentence that begins with the answer."""
    text = re.split(r"\n\s*\n|\.(?!\S)", text)[0].strip(" \t\r\n*_")
    text = text.replace("$", "") if text.count("$") == 1 else text  # a currency
    delimited = any(mark in text for mark in ("$", r"\(", r"\["))
    words = _WORDS.findall(_COMMANDS.sub(" ", text))
    if text and not delimited and (not words or words == [text]):
        return None if text.lower() in _VERDICTS else _in_box(text, "auto")
    sentence = f"The final answer is {text}"
    return _first_match(sentence, "auto") or _anywhere(sentence) if text else None


def _as_formula(text: str) -> str:
    r"""Puts a gold in $...$, for a bare \boxed{44\%} would only be read as a string."""
    text = re.sub(r"\$\.$", "$", text.strip())
    return text if len(text) > 1 and text[0] == text[-1] == "$" else f"${_tidy(text)}$"


def _tidy(text: str) -> str:
    r"""Writes numbers as math-verify reads them: `1\,234`, `1 234`, `\frac{1}{2,000}`, `3 1/2` (not 3/2),
    `(20)(3)` (not 23), `\approx 7`."""
    text = re.sub(r"^(?:\\displaystyle)?\s*\\approx", "", text.strip()).strip()
    text = _IN_BRACES.sub(lambda match: match[0].replace(",", ""), re.sub(r"(?<=\d),\\!(?=\d{3})", "", text))
    if _SPACED_NUMBER.fullmatch(text):
        return _GAP.sub("", text)
    if _PRODUCT.fullmatch(text):
        return re.sub(r"(?<=[\d)])\s*\(", r" \\cdot (", text)
    return _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text) if _MIXED_NUMBER.fullmatch(text) else text


_GAP = re.compile(r"\\[,;: ]|[~ \u00a0\u2009\u202f]")
_IN_BRACES = re.compile(r"(?<!\\)\{\d{1,3}(?:,\d{3})+\}")
_PRODUCT = re.compile(r"(?:[\d.]+|\(-?[\d.]+\))(?:\s*\(-?[\d.]+\))+")
_MIXED_NUMBER = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
_SPACED_NUMBER = re.compile(rf"[-+]?\d{{1,3}}(?:(?:{_GAP.pattern})\d{{3}})+(?:\.\d+)?")
_PI_FRACTION = re.compile(r"\\[dt]?frac\s*\\pi\s*(\d)")


def _first_match(text: str, target: str) -> Answer | None:
    """Reads an announced formula. What leaves it unread is dropped, one after the other: a percent sign,
    a full stop or comma at its end; the rule that takes the c of `a + b + c` for a unit."""
    target = target if target in _extraction_targets() else "auto"
    found = _read(text, target)
    if not found or found[0] != found[-1]:
        return Answer(tuple(found)) if found else None
    end = re.fullmatch(r"(.+?)(\\?%)?[.,]?\s*", found[0], re.DOTALL)
    if end and end[1] != found[0] and (number := _read(rf"\boxed{{{end[1]}}}", target)):
        return Answer(tuple(number), percent=end[2] is not None)
    kept = _read(text, f"{target}, units kept")
    return Answer(tuple(kept if kept and kept[0] != kept[-1] else found))


def _read(text: str, target: str) -> list[Any]:
    if not target.startswith("boxed"):
        text = _PI_FRACTION.sub(r"\\frac{\\pi}{\1}", text)
    return _parse(text, extraction_config=[_extraction_targets()[target]], extraction_mode="first_match")


def _anywhere(text: str) -> Answer | None:
    """Reads by the library's defaults: a number or formula wherever it stands."""
    found = _parse(text)
    return Answer(tuple(found)) if found else None


def _parse(text: str, **options: Any) -> list[Any]:
    """Calls math_verify.parse without its time-out, a Python signal that C code and threads do not obey."""
    from math_verify import parse

    return parse(text, parsing_timeout=None, **options)  # pyright: ignore[reportArgumentType]


@cache
def _extraction_targets() -> dict[str, Any]:
    """Returns what counts as LaTeX, for the gold and for each style."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-out is off

    def units_kept(target: LatexExtractionConfig) -> LatexExtractionConfig:
        return replace(target, normalization_config=replace(target.normalization_config, units=False))

    def announced(malformed_operators: bool) -> LatexExtractionConfig:
        rules = NormalizationConfig(  # the authors also set `equations`, which math-verify 0.9 always does
            nits=False, malformed_operators=malformed_operators, basic_latex=True, boxed="all", units=True
        )
        return LatexExtractionConfig(
            normalization_config=rules, boxed_match_priority=0, try_extract_without_anchor=False
        )

    targets = {"gold": LatexExtractionConfig(), "boxed": announced(False), "auto": announced(True)}
    return targets | {f"{name}, units kept": units_kept(target) for name, target in targets.items()}


_BRACES = re.compile(r"\\boxed\s*\{|\\(?!\\boxed)[\s\S]|[{}]")


def find_last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} whose braces balance; None if there is none. One pass."""
    start, open_braces, found = text.find(r"\boxed"), [], (-1, -1)
    for token in _BRACES.finditer(text, max(start, 0)) if start >= 0 else ():
        if token.group() == "}":
            began = open_braces.pop() if open_braces else -1
            if began > found[0]:
                found = (began, token.start())
        elif token.group()[-1] == "{" and token.group() != r"\{":  # \{ and \} are text, not braces
            open_braces.append(token.end() if len(token.group()) > 1 else -1)
    return text[found[0] : found[1]] if found[0] >= 0 else None
