"""What an answer's text says: a value that sympy can compare, its unit, its percent sign, its labels. Imports
sympy and math-verify's parser when the first answer is read."""

import re
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

from capo_exp.grading.spelling import spell, split_labels, split_unit

LONGEST_REMEMBERED = 200  # characters of a formula whose value is kept: completions of a group say the same
PLAIN_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\\[dt]?frac\{-?\d+\}\{\d+\})")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{([1-9]\d*)\}", re.ASCII)
_DECIMAL = re.compile(r"(?=.*\d)[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?", re.ASCII)
_POWER_OF_TEN = re.compile(r"(-?\d+\.\d*0)\s*\\(?:cdot|times)\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?", re.ASCII)
_REPEATING = re.compile(r"(-?\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", re.ASCII)
_LESS = r"(?:[<>]|\\(?:leq?|geq?|lt|gt|leqslant|geqslant|neq?)\b)"
_JOINT = r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|\b(?:or|and)\b|\\(?:cup|lor|vee)\b|[,;]"
_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\||:|\\mid\b|\\vert\b)\s*(.*?)\s*\\\}"
)


@dataclass(frozen=True)
class Answer:
    text: str
    """As it was spelled for the parser, with unit and percent sign."""
    body: str
    """Without them."""
    value: Any
    """sympy's; None if it cannot be read."""
    percent: bool = False
    unit: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict, hash=False)


def read_formula(text: str, *, malformed: bool = True) -> Answer | None:
    r"""Reads an answer alone; None if nothing is left of it. `malformed` also reads `\frac12` and `x^(2)`."""
    text = spell(text)
    bare, unit = split_unit(text)
    body = re.sub(r"\s*\\?%$", "", bare).rstrip()
    if not body:
        return Answer(text, text, None) if text else None
    read = _read_value if len(body) <= LONGEST_REMEMBERED else _read_value.__wrapped__
    value = read(body, malformed)
    if value is None and "%" in body:
        value = read(re.sub(r"\\?%", "", body), malformed)
    return Answer(text, body, value, body != bare.rstrip(), unit, split_labels(text))


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Answer | None:
    r"""Reads a gold answer: a formula alone, with or without $...$ or \boxed{...} around it."""
    text = re.sub(r"\$\.$", "$", gold.strip())
    while found := re.fullmatch(r"\$+([^$]*)\$+|\\boxed\s*\{(.*)\}", text, re.DOTALL):
        text = (found[1] or found[2] or "").strip()
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)  # $90^{\circ}$,$60^{\circ}$
    return read_formula(text) if text.strip("$") else None


@lru_cache(maxsize=16_384)
def _read_value(body: str, malformed: bool) -> Any:
    from sympy import Float, Integer, Mul, Pow, Rational, parse_expr

    if found := _FRACTION.fullmatch(body):
        return Rational(int(found[1] + "1") * int(found[2]), int(found[3]))
    if _DECIMAL.fullmatch(body):
        digits = body.replace(",", "")
        return Float(digits, "") if "." in digits else Integer(digits)
    if found := _POWER_OF_TEN.fullmatch(body):
        return Mul(Float(found[1], ""), Pow(10, int(found[2]), evaluate=False), evaluate=False)
    if found := _REPEATING.fullmatch(body):
        return parse_expr("{}.{}[{}]".format(*found.groups()))
    if found := _BUILDER.fullmatch(body):
        body = re.sub(rf"(?<![A-Za-z\\]){found[1]}(?![A-Za-z])", r"\\zeta ", found[2])
    return _read_union(body, malformed) if re.search(_LESS, body) else _parse(body, malformed)


def _read_union(body: str, malformed: bool) -> Any:
    """Reads inequalities that `or`, `and`, a comma or a union sign joins."""
    from sympy import And, Or, S

    pieces, joints = re.split(_JOINT, body), re.findall(_JOINT, body)
    if not joints or not all(re.search(rf"{_LESS}|=", piece) for piece in pieces):
        return _parse(body, malformed)
    read = [_parse(piece.strip(), malformed) for piece in pieces]
    if any(each is None for each in read):
        return None
    if all("and" in joint for joint in joints):
        return And(*read)
    either = Or(*read)
    commas = set(joints) <= {",", ";"} and len(either.free_symbols) == 1
    return And(*read) if commas and (either == S.true or either.as_set() == S.Reals) else either


def _parse(text: str, malformed: bool) -> Any:
    """Reads LaTeX; in a chain of equations that cannot be read, what stands last. None if neither can be."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
    from math_verify.parser import get_last_eq

    text = normalize_latex(text, _normalization(malformed))
    trigonometry = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text) is not None
    read = partial(
        latex2sympy,
        is_real=True,
        convert_degrees=trigonometry,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),  # R/r is not 1
    )
    for each in dict.fromkeys((text, get_last_eq(text))):
        try:
            return _settle(read(each))
        except Exception:  # the grammar's errors are bare Exceptions
            continue
    return None


def _settle(value: Any) -> Any:
    """Returns a = c of a = b = c, dv/dt as a symbol since it would evaluate to 0, and i as the imaginary
    unit, at any place but on its own."""
    from sympy import Derivative, Eq, FiniteSet, I, Symbol

    slopes = [each for each in value.atoms(Derivative) if isinstance(each.expr, Symbol)]
    value = value.xreplace({each: Symbol(str(each), real=True) for each in slopes}) if slopes else value
    parts, i = getattr(value, "_unsorted_args", ()), Symbol("i", real=True)
    if parts and not isinstance(value, FiniteSet) and all(isinstance(part, Eq) for part in parts):
        value = Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
    if i not in value.free_symbols:
        return value
    if isinstance(value, Eq):
        return Eq(value.lhs, value.rhs.subs(i, I), evaluate=False)
    return FiniteSet(*(p.subs(i, I) for p in parts)) if isinstance(value, FiniteSet) else value.subs(i, I)


@cache
def _normalization(malformed: bool) -> Any:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

    return NormalizationConfig(malformed_operators=malformed, boxed="none")
