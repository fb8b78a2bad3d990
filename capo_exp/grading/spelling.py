r"""How an answer is spelled before math-verify reads it: one table of rules, each with an example; and what
no parser of formulas knows: units, labels, dates, times, numbers in a base."""

import re
from itertools import chain
from typing import NamedTuple

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2009\u202f\u200a", " "),
    **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff", ""),
    **{half: rf"\frac{{{up}}}{{{down}}}" for half, up, down in ("½12", "¼14", "¾34", "⅓13", "⅔23")},
    **{name[0]: rf"\{name[2:]} " for name in (
        "\u00d7 times", "\u00b7 cdot", "\u22c5 cdot", "\u00f7 div", "\u00b1 pm", "\u03c0 pi", "\u03b8 theta",
        "\u221e infty", "\u2264 le", "\u2265 ge", "\u2260 ne", "\u2248 approx", "\u222a cup", "\u2229 cap",
        "\u2208 in", "\u2205 emptyset",
    )},
    **dict.fromkeys("\u00b0\u00ba", r"^\circ "),
    "\u2044": "/",
    "\u00a2": r" \text{cents}",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣᵏ₀₁₂₃₄₅₆₇₈₉", "0123456789+-nxk0123456789")
_TEXT = r"\\(?:text(?:rm|it|bf|sf)?|mbox|boldsymbol|math(?:rm|it|bf|sf)|operatorname|rm)\s*\{([^{}]*)\}"
_UNIT_TEXT = _TEXT.replace("|boldsymbol", "").replace("it|bf|sf)|op", "it|sf)|op")  # bold is a vector
_UPRIGHT = r"(?:\{\\rm ([ei])\}|\\(?:math(?:rm|it|sf)|text|operatorname)\s*\{([ei])\})"
_GAP = r"(?:\\[,;: ]|[~ ])"


class Swap(NamedTuple):
    pattern: str
    written: str
    example: str
    becomes: str


RULES = (
    Swap(r"\\(?:underline|bm|bold|(?:text)?color\s*\{\w+\})\s*\{([^{}]*)\}", r"\1", r"\underline{7}", "7"),
    Swap(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", "(0,1) U (2,3)", r"(0,1) \cup (2,3)"),
    Swap(r"(?<=\d)\s*x\s*(?=10\s*\^)", r" \\times ", "3 x 10^8", r"3 \times 10^8"),
    Swap(r"^(?:\\text\s*\{)?\s*[Aa]ll real numbers\s*\}?$", r"\\mathbb{R}",
         "all real numbers", r"\mathbb{R}"),
    Swap(r"\\(?:display|text)style\b\s*|\\(?:left|right)(?=[][()|]|\\[{}])", "", r"\left(5", "(5"),
    Swap(r"^\$+([^$]+?)\$+$", r"\1", "$5$", "5"),
    Swap(r"^[*_`]+|[*_`]+$", "", "**3/4**", "3/4"),
    Swap(r"(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ",", r"10,\!000", "10,000"),
    Swap(rf"^([-+]?\d{{1,3}}){_GAP}(\d{{3}})(?:{_GAP}(\d{{3}}))?(\.\d+)?$", r"\1\2\3\4", r"1\,234", "1234"),
    Swap(r"\\!", "", r"4\!:\!51", "4:51"),
    Swap(r"(?<!\\)\\[,;: ]", " ", r"4\,i", "4 i"),
    Swap(r"(?<!\\hat\{)(\\gamma(?![A-Za-z])|(?<![A-Za-z\\])I(?=_))", r"\\hat{\1}",
         r"2\gamma", r"2\hat{\gamma}"),
    Swap(r"(?<![A-Za-z\\])([A-Za-z])''(?!\w)", r"\\ddot{\1}", "y''", r"\ddot{y}"),
    Swap(r"(?<![A-Za-z\\])([A-Za-z])'(?!\w)", r"\\dot{\1}", "f'(x)", r"\dot{f}(x)"),
    Swap(r"\^(-(?:\d+|[A-Za-z]))", r"^{\1}", "10^-5", "10^{-5}"),
    *(
        Swap(rf"(?<=\d)\s*(\\text\s*\{{)?\s*{word}\b", rf" \\cdot 10^{{{power}}}\1",
             f"3 {word}", rf"3 \cdot 10^{{{power}}}")
        for word, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9))
    ),
    Swap(r"(\d)\1\1+\s*(?:\.\.\.|\\[cl]?dots)$", r"\\overline{\1}", "0.333...", r"0.\overline{3}"),
    Swap(r"^(\d+)\s*:\s*(\d+)\s*:\s*(\d+)$", r"(\1, \2, \3)", "1:2:3", "(1, 2, 3)"),
    Swap(r"\\varnothing", r"\\emptyset", r"\varnothing", r"\emptyset"),
    Swap(r"^\\text\s*\{\s*([A-Z](?:,\s*[A-Z])+)\s*\}$", r"\1", r"\text{C, F}", "C, F"),
    Swap(r"(?<!\\)\{(\d{1,3}),(\d{3})\}", r"{\1\2}", r"\frac{1}{2,000}", r"\frac{1}{2000}"),
    Swap(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))", r"\\sqrt{\1\2\3}", "2√3", r"2\sqrt{3}"),
    Swap(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?)\s?[eE]\+?(-?\d+)(?![\d.^])", r"\1 \\cdot 10^{\2}",
         "1.5e-7", r"1.5 \cdot 10^{-7}"),
    Swap(rf"(?<=.){_UPRIGHT}", r" \1\2", r"4\mathrm{i}", "4 i"),
    Swap(rf"{_UPRIGHT}(?=.)", r"\1\2 ", r"\mathrm{e}^2", "e ^2"),
    Swap(r"(?s)^((?!.*\\(?:sin|cos|tan|cot|sec|csc)).*?)\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*[CF]?$",
         r"\1 \\text{degrees}",
         r"60^\circ", r"60 \text{degrees}"),
    Swap(r"^\\(?:text|textbf|mbox)\s*\{\s*(-?\d[\d.,/]*)\s+([^{}\d:]+)\}$", r"\1 \\text{\2}",
         r"\text{12 apples}", r"12 \text{apples}"),
    Swap(r"\s*\\text\s*\{\s*percent\s*\}|\s*\bpercent\b", r"\\%", "40 percent", r"40\%"),
    Swap(r"^\s*\\approx\s*", "", r"\approx 8.24", "8.24"),
    Swap(r"\\langle(.*?)\\rangle", r"(\1)", r"\langle 1, 2 \rangle", "( 1, 2 )"),
    Swap(r"^\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)\s*(?:=|\\in\b)\s*(?=[(\\])", "", "(x,y)=(3,-1)", "(3,-1)"),
    Swap(r"^[A-Za-z]\s*\\in\b\s*(?=[([\\])", "", r"x \in (3, 4]", "(3, 4]"),
    Swap(r"\\[dt]?frac\s*\\pi\s*(\d)", r"\\frac{\\pi}{\1}", r"\frac \pi4", r"\frac{\pi}{4}"),
    Swap(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", "3 1/2", r"3\frac{1}{2}"),
    Swap(r"^([\d.]+)\s*(?=\(-?[\d.]+\)$)|(?<=\d\))\s*(?=\(-?[\d.]+\))", r"\1 \\cdot ",
         "(20)(3)", r"(20) \cdot (3)"),
)  # fmt: skip
"""Applied in this order to a whole answer; the examples are tested."""
_RULES = [(re.compile(rule.pattern), rule.written) for rule in RULES]


def spell(text: str) -> str:
    """Writes an answer as math-verify reads it."""
    text = re.sub(r"([⁰¹²³⁴-⁻ⁿˣᵏ]+)|[₀-₉]+", _lower, text.strip()).translate(str.maketrans(_SIGNS)).strip()
    for pattern, written in _RULES:
        text = pattern.sub(written, text)
    return re.sub(r"(?<=[^\\.\s])[.,;:]$", "", text.strip()).strip()


def _lower(raised: re.Match[str]) -> str:
    return f"{'^' if raised[1] else '_'}{{{raised[0].translate(_RAISED)}}}"


# --- units ---

_NAMES = {
    alias: names.split()[0]
    for names in (
        "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre",
        "ft foot feet", "in inch inche", "yd yard", "mi mile", "mph", "kg kilogram", "g gram", "mg milligram",
        "lb lbs", "oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year yr",
        "l liter litre", "ml mL milliliter", "$ dollar usd USD", "€ euro eur EUR", "£ gbp GBP", "cent",
        "degree deg", "radian rad", "n newton", "j joule", "kj kJ", "w watt", "kw kW", "v volt", "hz Hz",
        "pa", "k kelvin", "mol",
    )
    for alias in names.split()
}  # fmt: skip
"""A unit as it is written -> its name. Two names that differ contradict each other."""
_SHORT = "|".join(sorted((name for name in _NAMES if name.isalpha() and len(name) > 1), key=len)[::-1])
_WORDS = r"[A-Za-z]{4,}(?:[ -][A-Za-z]+){0,5}|(?:sq|cu)\.? [a-z]+|men|cups?"
_NO_UNIT = r"infinity|sqrt|squared|cubed|factorial|(?:over|times|plus|minus|dozen)\b"
_POWER = r"(?:\^\{?(-?\d)\}?)?"
_UNIT = re.compile(
    rf"(?<=[\w}})\]%|])[\s~/]*(?:{_UNIT_TEXT}|(?<=[\d}}])((?:{_SHORT})s?)\.?|(?<=[\d}}] )((?:{_SHORT})s?)\.?"
    rf"|(?<=[\d}}] )([A-Za-z]+\s*/\s*[a-z]+)|(?<=[\d}})] )(?!{_NO_UNIT})({_WORDS})){_POWER}\s*$"
)
_CURRENCY = re.compile(r"^(-?)\s*(?:US)?(\\?\$|€|£|¥|\\euro|\\pounds)\s*(?=[-\d.])")


def split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    r"""Returns an answer without its unit, and the names in the unit: 5 and (m, s) for `5 \text{ m/s}`.

    One letter is a unit only in \text{} or beside a slash: `4t` is a product. What stands alone is no unit.
    """
    units = ""
    if found := _CURRENCY.match(text):
        text, units = found[1] + text[found.end() :], found[2]
    while found := _UNIT.search(text):
        units = " ".join(group for group in (*found.groups(), units) if group)
        text = re.sub(r"\s*\\cdot$", "", text[: found.start()])
    units = re.sub(r"\bmph\b", "mi h", units.lower())
    for word, power in (("sq(?:uare)?", 2), ("cu(?:bic)?", 3)):
        units = re.sub(rf"\b{word}\b\.? ?([a-z]+)", rf"\1 {power}", units)
    words = re.findall(r"[$€£¥]|[a-z]+|-?\d", units)
    named = [_NAMES.get(word) or _NAMES.get(word.removesuffix("s")) or word for word in words]
    return text, tuple(name for name in named if name != "per")


def units_differ(gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Returns whether both units are known and not the same, or unknown but for their powers the same."""
    words = [[name for name in unit if not name[-1].isdigit()] for unit in (gold, answer)]
    known = words[0] == words[1] or all(name in _NAMES.values() for name in chain(*words))
    return gold != answer and bool(gold and answer) and known


# --- what is compared as text ---


def plain_text(text: str) -> str:
    r"""Drops what only sets words: \text{}, dollar signs, more than one space."""
    return " ".join(re.sub(r"\\[ ,;]|[$~*]", " ", re.sub(_TEXT, r"\1", text)).split())


def find_letter(text: str) -> str | None:
    """Returns the letter of a choice: B for `(B)`, `B.`, `B) 12 apples` and `Option B`."""
    named = r"(?i:(?:option|choice|answer):?\s+)?\(?([A-J])(?:[).:]+(?:\s.*)?|\s+-\s.*)?"
    found = re.fullmatch(named, plain_text(text), re.DOTALL)
    return found[1] if found else None


_CLOCK = re.compile(r"(\d{1,2})((?::\d\d){1,2}|(?=\s*[ap]))\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BASE = re.compile(rf"([A-F]*\d[\d.A-Fa-f]*)_\{{?\s*(\d+|{'|'.join(_BASES)})\s*\}}?")


def read_moment(text: str) -> tuple[object, ...] | None:
    """Reads a clock time, a number with its base or a date; None if it is none of them."""
    text = plain_text(text)
    if found := _CLOCK.fullmatch(text):
        return ("clock", int(found[1]), found[2] or ":00", (found[3] or "").lower())
    if found := _BASE.fullmatch(text):
        return ("base", found[1].upper(), str(_BASES.index(found[2]) + 2) if found[2] in _BASES else found[2])
    found = re.fullmatch(r"(\d{4})-(\d\d?)-(\d\d?)", text)
    return ("date", *map(int, found.groups())) if found else None


def moments_differ(gold: str, answer: str) -> bool | None:
    """Compares times, dates and numbers in a base; None if there is none, or a ratio like a time."""
    one, other = read_moment(gold), read_moment(answer)
    only, beside = (one, answer) if other is None else (other, gold)
    if only is None:
        return None
    if one is None or other is None:
        if only[0] == "clock" and not only[-1]:  # a ratio
            return None
        if only[0] == "clock" and gold.isdigit():  # an hour
            return only[1:3] != (int(gold), ":00")
        return only[0] != "base" or only[1] != plain_text(beside).upper()
    # the labels of outputs_qwen25math hold \text{4:30 p.m.} and 4:30 \text{ p.m.} apart
    set_otherwise = one[0] == "clock" and gold.startswith(r"\text") and answer[0].isdigit() and "\\" in answer
    return (one != other and one != (*other[:-1], "")) or set_otherwise


def split_parts(text: str) -> list[str]:
    """Splits a list at the commas, semicolons and the word `and` that stand in no bracket."""
    text = re.sub(r",?\s*(?:\\text\s*\{\s*and\s*\}|\band\b)", ",", text)
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def split_labels(text: str) -> dict[str, str]:
    r"""Returns what `a = -2, b = 3` or `\text{Ann: } 5, \text{Bob: } 9` says of each label; else nothing."""
    parts = split_parts(plain_text(text))
    found = [re.fullmatch(r"([A-Za-z][\w{}' ]*?)\s*[:=]\s*([^=<>:]+)", part) for part in parts]
    labels = {each[1].lower(): each[2] for each in found if each}
    return labels if len(labels) == len(parts) > 1 else {}
