"""Grading: finding a completion's answer, comparing it with the gold, and doing so in processes that can be
killed. Imports no torch, and math-verify only when an answer is graded."""

from capo_exp.grading.compare import Grade, grade
from capo_exp.grading.pool import GradingFailed

__all__ = ["Grade", "GradingFailed", "grade"]
