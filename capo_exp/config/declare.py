"""What a part says of itself, by a decorator or by a parameter that it names. Imports no torch.

A function of algorithms/, or of a user's package, is decorated; `declares` looks through functools.partial.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

OFFERS = ("prompts", "reference_rewards", "state_values")
"""What a group filter, an advantage or a credit gets beside what is always passed, if it has a parameter of
that name: the rollout's prompts [P]; the rewards [P, N] of the reference's completions of each, which
algo.reference_samples asks for; the value [B, T] of each state, NaN at a token before which there is none,
which algo.continuations asks for."""


def _mark(function: Function, name: str, value: object = True) -> Function:
    setattr(function, name, value)
    return function


def compares_group(function: Function) -> Function:
    """Marks an advantage or a token loss that compares the completions of a prompt: there have to be two, and
    a loss has to find them in one optimiser step."""
    return _mark(function, "compares_group")


def whole_step(function: Function) -> Function:
    """Marks a selection, token loss or aggregation that has to see all tokens of an optimiser step at once,
    after a scoring pass."""
    return _mark(function, "whole_step")


def regresses(function: Function) -> Function:
    """Marks a token loss in which the advantage is a target, or orders completions, and is no factor, so that
    the weight of a correction would move it: it takes none."""
    return _mark(function, "regresses")


def corrects(*, unless_zero: str) -> Callable[[Function], Function]:
    """Marks a token loss that weighs by the ratio to the sampler unless its number `unless_zero` is 0, so
    that a correction would do it again: it takes none."""
    return lambda function: _mark(function, "corrects", unless_zero)


def needs_reference(function: Function) -> Function:
    """Marks a token loss that holds the policy against the reference: it gets `ref_log_probs`."""
    return _mark(function, "needs_reference")


def takes_lists(function: Function) -> Function:
    """Marks a reward function that takes all completions of a step at once: (completions, answers, problems),
    lists of equal length -> a list of rewards."""
    return _mark(function, "takes_lists")


def needs_kl(*, unless_zero: str) -> Callable[[Function], Function]:
    """Marks a shaping or a credit that uses the KL to the reference unless its number `unless_zero` is 0."""
    return lambda function: _mark(function, "needs_kl", unless_zero)


def ordered(low: str, high: str) -> Callable[[Function], Function]:
    """Marks a function whose number `low` must not be above its number `high`."""
    return lambda function: _mark(function, "ordered", (low, high))


def asked(function: Callable[..., Any], offers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the OFFERS for which a part has a parameter."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offers.items() if name in parameters}


def declares(function: Callable[..., Any], what: str) -> Any:
    """Returns what a function, or that of a partial, declares under a name; None where it is silent."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, what, None)
