"""Parts: what a YAML may name, what it must set, and where a wrong name is reported."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from capo_exp.config.build import build_part, check_names, check_target, is_local_path, resolve_model_path
from capo_exp.config.errors import ConfigError

BOUNDS: dict[str, Any] = {
    "_target_": "capo_exp.algorithms.capo.shift_bounds",
    "_partial_": True,
    "policy_shift_max": 1e-4,
    "objective_shift_min": -1e-2,
    "objective_shift_max": 1e-2,
}


def refusal(part: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        build_part(part, key="algo.selection", **options)
    return str(error.value)


def test_binds_the_numbers() -> None:
    built = build_part(BOUNDS, key="algo.selection")
    assert isinstance(built, partial)
    assert built.keywords == {k: v for k, v in BOUNDS.items() if not k.startswith("_")}


def test_a_built_function_runs() -> None:
    part = {
        "_target_": "capo_exp.algorithms.grpo.group_normalised",
        "_partial_": True,
        "eps": 1e-4,
        "target_std": 1.0,
    }
    assert build_part(part, key="algo.advantage")(torch.tensor([[0.0, 1.0]])).shape == (1, 2)


def test_nested_values_stay_plain() -> None:
    part = {
        "_target_": "capo_exp.data.arithmetic.problems",
        "_partial_": True,
        "families": {"chain": [1]},
        "num_train": 1,
        "num_eval": 1,
        "seed": 0,
    }
    assert type(build_part(part, key="dataset.source").keywords["families"]) is dict


def test_unknown_parameter_names_key_function_and_known() -> None:
    wrong = {**BOUNDS, "policy_shfit_max": 1}
    assert refusal(wrong) == (
        "algo.selection.policy_shfit_max: unknown parameter of capo_exp.algorithms.capo.shift_bounds; "
        "known: policy_shift_max, objective_shift_min, objective_shift_max"
    )


def test_a_tensor_argument_is_no_setting() -> None:
    assert refusal({**BOUNDS, "log_probs": 1}).startswith("algo.selection.log_probs: unknown parameter")


def test_function_without_numbers_says_none() -> None:
    part = {"_target_": "capo_exp.algorithms.neutral.keep_all", "_partial_": True, "x": 1}
    assert refusal(part).endswith("unknown parameter of capo_exp.algorithms.neutral.keep_all; known: none")


def test_missing_number() -> None:
    part = {k: v for k, v in BOUNDS.items() if k != "objective_shift_min"}
    assert refusal(part).startswith("algo.selection.objective_shift_min: no value;")
    check_names(part, key="algo.selection")  # names alone are right


def test_what_the_caller_passes_may_be_missing_and_must_not_be_set() -> None:
    part = {k: v for k, v in BOUNDS.items() if k != "policy_shift_max"}
    build_part(part, key="algo.selection", runtime=["policy_shift_max"])
    assert "unknown parameter" in refusal(BOUNDS, runtime=["policy_shift_max"])


@pytest.mark.parametrize("value", ["abc", None, [1.0]])
def test_a_number_must_be_a_number(value: object) -> None:
    message = refusal({**BOUNDS, "policy_shift_max": value})
    assert message.startswith("algo.selection.policy_shift_max=") and "expected a number" in message


@pytest.mark.parametrize("target", ["os.system", "capo_expo.x", "", "capo_exp"])
def test_target_outside_the_package(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^algo\.selection\._target_=.*: expected a function of capo_exp"):
        check_target({"_target_": target}, key="algo.selection")


def test_target_that_is_not_there() -> None:
    wrong = {**BOUNDS, "_target_": "capo_exp.algorithms.capo.shift_bound"}
    assert refusal(wrong).endswith("nearest: shift_bounds")
    wrong["_target_"] = "capo_exp.algorithms.cap.shift_bounds"
    assert "there is no module capo_exp.algorithms.cap" in refusal(wrong)


def test_target_whose_dependency_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr("capo_exp.config.build.importlib.import_module", absent)
    assert "expected the package vllm to be installed" in refusal(BOUNDS)


def test_model_paths(tmp_path: Path) -> None:
    assert Path(resolve_model_path("pkg://capo_exp/assets/tiny")).parts[-3:] == ("capo_exp", "assets", "tiny")
    assert resolve_model_path("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert resolve_model_path("~/x") == str(Path.home() / "x")
    with pytest.raises(ConfigError, match=r"model\.path=pkg://no_such_package/x"):
        resolve_model_path("pkg://no_such_package/x")
    assert is_local_path(str(tmp_path)) and is_local_path("./x") and not is_local_path("Qwen/Qwen2.5-0.5B")
