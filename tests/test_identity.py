import dataclasses
from dataclasses import dataclass, field

from capo_exp.config.schema import TrainConfig
from capo_exp.runs.identity import list_engine_conditions, run_dir, run_id, select_results


def test_what_changes_results_changes_the_id(composed, config):
    overrides = (
        "seed=1", "num_steps=7", "regime.learning_rate=3e-5", "algo.token_loss.clip_eps_low=0.3", "algo=capo",
        "algo.kl_coefficient=0.1", "dataset.levels=[1]", "evaluation.top_p=0.9", "algo.num_minibatches=2",
        "rollout=vllm", "rollout.top_p=0.9", "rollout/correction=token_mask", "reward=math_verify",
        "reward=function",
    )  # fmt: skip
    assert len({run_id(config), *(run_id(composed("algo=grpo", override)) for override in overrides)}) == 15


@dataclass
class Inner:
    strength: float = 0.0
    parts: dict = field(default_factory=lambda: {"_target_": "capo_exp.none", "_partial_": True})
    label: str = field(default="", metadata={"result": False})


@dataclass
class Newer(TrainConfig):
    """A version that knows more keys, all with neutral defaults."""

    bonus: float = 0.0
    names: list[str] = field(default_factory=list)
    workers: int = field(default=1, metadata={"result": False})
    inner: Inner = field(default_factory=Inner)
    hidden: Inner = field(default_factory=Inner, metadata={"result": False})


def test_the_schema_says_what_counts(config):
    """A new key at its neutral default, or one that changes no result, leaves every id as it is."""

    def newer(**more):
        return run_id(Newer(**vars(config), **more))

    for same in ({}, {"workers": 7}, {"inner": Inner(label="x")}, {"hidden": Inner(strength=1.0)}):
        assert newer(**same) == run_id(config), same
    changed = [{"bonus": 0.5}, {"names": ["a"]}, {"inner": Inner(1.0)}, {"inner": Inner(parts={"a": 1})}]
    assert len({run_id(config), *(newer(**more) for more in changed)}) == 5
    assert select_results(Newer(**vars(config), bonus=0.5)) == select_results(config) | {"bonus": 0.5}


AFFAIRS = {"gpu_memory_utilization", "start_seconds", "generate_seconds", "sleep_level", "max_num_seqs"}


def test_what_an_engine_runs_with_is_its_own_affair(composed):
    vllm = composed("algo=grpo", "rollout=vllm")
    conditions = list_engine_conditions(vllm.rollout.engine)
    assert AFFAIRS < set(conditions) < vllm.rollout.engine.keys()
    more = dict.fromkeys(conditions, 9)
    other = dataclasses.replace(vllm.rollout, engine=vllm.rollout.engine | more)
    assert run_id(dataclasses.replace(vllm, rollout=other)) == run_id(vllm)
    assert run_id(composed("algo=grpo", "rollout=vllm", "rollout.engine.dtype=float16")) != run_id(vllm)


def test_run_dir_is_readable_and_safe(config, tmp_path):
    assert run_dir(config) == tmp_path / "default" / (
        f"grpo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-{run_id(config)}"
    )
    model = dataclasses.replace(config.model, name="org/My Model=2")
    odd = dataclasses.replace(config, model=model, experiment_name="../paper/figure 1")
    assert run_dir(odd) == tmp_path / "paper_figure_1" / (
        f"grpo-org_My_Model_2-arithmetic-aggressive-lr0.0001-12x8-s0-{run_id(odd)}"
    )
