"""Parts: what a YAML may name and set, what functions carry and declare, how mistakes are told."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Annotated, Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import torch

from capo_exp.algorithms.kinds import Positive
from capo_exp.config.build import build_part, check_target, part_declares
from capo_exp.config.declare import compares_group, declares, needs_kl, ordered, whole_step
from capo_exp.config.errors import ConfigError
from capo_exp.config.ranges import AT_LEAST_1, FINITE, POSITIVE, SHARE, Rule, one_of
from capo_exp.config.schema import conf_dir
from capo_exp.config.signature import check_settings, find_faults, read_settings


class Bounds(TypedDict):
    low: float
    high: Annotated[float, POSITIVE]


@ordered("low", "high")
def select(
    scored: float,
    *,
    low: Annotated[float, FINITE],
    high: Annotated[float, POSITIVE],
    looks: Annotated[int, AT_LEAST_1] = 1,
    score: Callable[[float], float] = abs,
) -> float:
    return scored * (low + high) * looks + score(scored)


class Settings:
    def __init__(self, model: str, *, share: Annotated[float, SHARE], name: str = "") -> None:
        self.seen = (model, share, name)


PART: dict[str, Any] = {"_target_": f"{__name__}.select", "_partial_": True, "low": -1, "high": 2.0}


@pytest.fixture(autouse=True)
def own_functions_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPO_EXP_PLUGINS", "tests")


def refusal(part: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build_part(part, key="algo.selection")
    return str(error.value)


def test_two_numbers_in_order_may_be_left_to_the_function() -> None:
    @ordered("low", "high")
    def by_default(*, low: float = 0.1, high: float = 0.2) -> None: ...

    check_settings(by_default, {"low": 0.15}, "algo.selection")
    with pytest.raises(ConfigError, match=r"algo\.selection\.low=0\.3: expected at most high=0\.2"):
        check_settings(by_default, {"low": 0.3}, "algo.selection")


def test_binds_the_numbers_of_functions_and_classes() -> None:
    built = build_part(PART, key="algo.selection")
    assert isinstance(built, partial) and built.keywords == {"low": -1, "high": 2.0}
    assert built(3.0) == 6.0
    settings = {"_target_": f"{__name__}.Settings", "_partial_": True, "share": 1}
    assert build_part(settings, key="x")("model").seen == ("model", 1, "")
    assert refusal({**settings, "share": 2}) == "algo.selection.share=2: expected a number in [0, 1]"
    own = {"_target_": "capo_exp.algorithms.grpo.group_normalised", "_partial_": True, "eps": 1e-4}
    advantage = build_part({**own, "target_std": 1.0}, key="algo.advantage")
    assert advantage(torch.tensor([[0.0, 1.0]])).shape == (1, 2)


def test_nested_values_stay_plain() -> None:
    numbers = {"families": {"chain": [1]}, "num_train": 1, "num_eval": 1, "seed": 0}
    part = {"_target_": "capo_exp.data.arithmetic.problems", "_partial_": True, **numbers}
    assert type(build_part(part, key="dataset.source").keywords["families"]) is dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hihg": 1}, ".hihg: unknown parameter of {t}.select; known: low, high, looks, score"),
        ({"scored": 1}, ".scored: unknown parameter of {t}.select; "),  # what the caller passes is no setting
        ({"high": None}, ".high=null: expected a positive finite number"),
        ({"high": 0}, ".high=0: expected a positive finite number"),
        ({"high": float("nan")}, ".high=nan: expected a positive finite number"),
        ({"looks": 0}, ".looks=0: expected an integer of at least 1"),
        ({"looks": 1.5}, ".looks=1.5: expected an integer of at least 1"),
        ({"low": 3}, ".low=3: expected at most high=2.0"),
        ({"score": PART | {"high": -2}}, ".score.high=-2: expected a positive finite number"),  # at any depth
        ({"_target_": "os.system"}, "._target_=os.system: expected a function of capo_exp, as in"),
        ({"_target_": "{t}.selec"}, "._target_={t}.selec: unknown function; expected one of "),
        (
            {"_target_": "tests.nowhere.select"},
            "._target_=tests.nowhere.select: there is no module tests.now",
        ),
    ],
)
def test_a_mistake_names_its_key(change: dict[str, Any], message: str) -> None:
    if "_target_" in change:
        change = {"_target_": change["_target_"].format(t=__name__)}
    assert refusal(PART | change).startswith(f"algo.selection{message.format(t=__name__)}")


def test_a_number_without_a_value() -> None:
    del (part := dict(PART))["high"]
    assert refusal(part) == f"algo.selection.high: no value; {__name__}.select needs one here"
    assert refusal({"_target_": "capo_exp.algorithms.neutral.keep_all", "x": 1}).endswith("known: none")
    assert refusal(PART | {"_target_": f"{__name__}.selekt"}).endswith("nearest: select")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (float, [1, 0.5], {"": "a number", True: "a number"}), (bool, [True], {1: "true or false"}),
        (str, [""], {1: "text", None: "text"}),
        (
            Annotated[float, POSITIVE],
            [1],
            {"abc": "a positive finite number", True: "a positive finite number"},
        ),
        (Annotated[float, POSITIVE] | None, [None, 1], {0: "a positive finite number"}),
        (Annotated[float | None, POSITIVE], [None, 1], {0: "a positive finite number"}),
        (str | int | None, [None, "0,1", 2], {0.5: "text"}),
        (Annotated[str, one_of("a", "b")], ["a"], {"c": "one of a, b", 1: "one of a, b"}),
    ],
)  # fmt: skip
def test_what_an_annotation_accepts(kind: Any, right: list[Any], wrong: dict[Any, str]) -> None:
    for value in right:
        assert not list(find_faults(kind, "k", value)), value
    for value, expected in wrong.items():
        assert [str(e).partition(": ")[2] for e in find_faults(kind, "k", value)] == [f"expected {expected}"]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (list[Annotated[float, SHARE]], [0.5, 2], "k[1]=2: expected a number in [0, 1]"),
        (Sequence[int], 3, "k=3: expected a list"),
        (Mapping[str, Sequence[Annotated[int, AT_LEAST_1]]], {"a": [1, 0]}, "k.a[1]=0: expected an integer"),
        (dict[str, Annotated[float, POSITIVE]] | None, {"a": -1}, "k.a=-1: expected a positive"),
        (dict[str, float], [1], "k=[1]: expected a mapping"),
        (Annotated[dict[str, float], Rule(lambda v: "a" in v, "an a")], {}, "k={}: expected an a"),
        (Bounds, {"low": 1}, "k={'low': 1}: expected a mapping with low, high"),
        (Bounds, {"low": 1, "high": 0}, "k.high=0: expected a positive"),
    ],
)
def test_ranges_hold_at_any_depth(kind: Any, value: Any, message: str) -> None:
    assert str(next(find_faults(kind, "k", value))).startswith(message)


def test_a_target_whose_dependency_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr("capo_exp.config.build.importlib.import_module", absent)
    assert refusal(PART).endswith("the package vllm to be installed, or its folder in PYTHONPATH")
    with pytest.raises(ConfigError, match=r"expected a function of capo_exp, as in"):
        check_target({"_target_": "os.system"}, key="x")  # imports nothing, so it does not get so far


def test_declarations_are_read_through_partials_and_wrappers() -> None:
    @compares_group
    @whole_step
    @needs_kl(unless_zero="beta")
    def part(*, beta: float) -> float:
        return beta

    bound = partial(partial(part, beta=1.0))
    assert (declares(bound, "compares_group"), declares(bound, "needs_kl")) == (True, "beta")
    assert declares(part, "whole_step") and declares(print, "whole_step") is None


def test_a_part_inside_a_part_inside_a_part_declares() -> None:
    loss = {"_target_": "capo_exp.algorithms.dpo.preference", "beta": 0.1}
    loss = {"_target_": "capo_exp.algorithms.dppo.anchored", "token_loss": loss, "sampler_share": 1.0}
    outer = {"_target_": "capo_exp.algorithms.cpgd.reweighted", "token_loss": loss}
    for what in ("needs_reference", "compares_group", "regresses", "whole_step"):
        assert part_declares(outer, "algo.token_loss", what), what


def numbers_without_range(kind: Any) -> Iterator[Any]:
    """Yields the numbers of an annotation that no range is around; those of callables are no settings."""
    if kind in (int, float):
        yield kind
    elif is_typeddict(kind):
        for each in get_type_hints(kind, include_extras=True).values():
            yield from numbers_without_range(each)
    elif get_origin(kind) is Annotated and any(isinstance(mark, Rule) for mark in get_args(kind)):
        return
    elif get_origin(kind) is not Callable:
        for each in get_args(kind):
            yield from numbers_without_range(each)


def test_every_number_that_conf_can_set_has_a_range() -> None:
    texts = [path.read_text() for path in conf_dir().rglob("*.yaml")]
    targets = {target for text in texts for target in re.findall(r"_target_: *(capo_exp[\w.]+)", text)}
    assert len(targets) > 50
    bare = []
    for target in sorted(targets):
        module, _, name = target.rpartition(".")
        settings = read_settings(getattr(importlib.import_module(module), name))
        bare += [f"{target}.{s.name}" for s in settings.values() if list(numbers_without_range(s.annotation))]
    assert not bare
    assert list(numbers_without_range(Bounds)) == [float]  # this test can fail


LAZY = """
from __future__ import annotations
from typing import TYPE_CHECKING
from capo_exp.algorithms.kinds import Positive
if TYPE_CHECKING:
    from elsewhere import Model

def part(given: Model, *, share: Positive, model: Model) -> Model: ...
"""


def test_annotations_that_are_text_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's module that imports a name for type checkers alone."""
    module = ModuleType("lazy_parts")
    exec(LAZY, vars(module))
    monkeypatch.setitem(sys.modules, "lazy_parts", module)
    settings = read_settings(module.part)
    assert {name: each.annotation for name, each in settings.items()} == {"share": Positive, "model": Any}
