"""Kinds of numbers that parts have, each with its range; a part's annotation says what a YAML may give it."""

from typing import Annotated

from capo_exp.config import ranges

Count = Annotated[int, ranges.AT_LEAST_1]
Share = Annotated[float, ranges.SHARE]
Positive = Annotated[float, ranges.POSITIVE]
PositiveOrInf = Annotated[float, ranges.POSITIVE_OR_INF]
NonNegative = Annotated[float, ranges.NON_NEGATIVE]
NonNegativeOrInf = Annotated[float, ranges.NON_NEGATIVE_OR_INF]
NotNan = Annotated[float, ranges.NOT_NAN]
UpTo1 = Annotated[float, ranges.ABOVE_0_TO_1]
From1 = Annotated[float, ranges.FROM_1]
AtLeast1 = Annotated[float, ranges.AT_LEAST_1_OR_INF]
Above1 = Annotated[float, ranges.ABOVE_1_OR_INF]
