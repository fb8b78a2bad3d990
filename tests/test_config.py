"""Every YAML composes and passes the checks; every impossible combination is refused in one line."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING

from capo_exp.config.build import find_parts
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.ranges import Rule
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from tests.conftest import KEYS
from tests.pieces import one_line

NUMBERS = (int, float, list[float], int | None, float | None)
ZERO_BETA = ["optimizer.betas=[0.0,0.999]", "curvature.betas=[0.9,0.999]"]


def choices(group):
    names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    return [name for name in names if name != "auto"]  # which is of no model until it has a path


@pytest.fixture
def made(composed, tmp_path):
    """Composes as if scripts/pretrain.py had made the models that are not shipped."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')

    def compose_config(*overrides):
        config = composed(*overrides)
        absent = config.model.path.startswith("outputs/")
        return composed(*overrides, f"model.path={tmp_path}") if absent else config

    return compose_config


@pytest.mark.slow
@pytest.mark.parametrize(
    "group", ["algo", "model", "dataset", "regime", "rollout", "reward", "optimizer", "logger"]
)
def test_every_choice_composes_and_passes(made, group):
    two = ("regime.prompts_per_step=48", "regime.group_size=2")
    beside = dict.fromkeys(("direct_advantage_po", "mdpo"), ("rollout=pairs", *two))
    beside |= {"pairs": two, "demonstrations": ("algo=sft", "regime.group_size=1")}
    for choice in choices(group):
        config = made(f"{group}={choice}", *beside.get(choice, ()))
        if choice != "function":  # whose function only a user can name
            check(config)
        assert getattr(config, group).name == choice


@pytest.mark.slow
def test_every_choice_on_top_composes_and_passes(made):
    """Selections, step rules and experiments have tests of their own."""
    for choice in choices("prompt"):
        check(config := made("dataset=math", f"prompt={choice}"))
        assert config.dataset.prompt_style == choice
    for choice in choices("rollout/correction"):
        check(made(f"rollout/correction={choice}"))
    assert made("rollout/correction=none").rollout == made().rollout
    regimes = [made(f"regime={regime}").regime for regime in choices("regime")]
    for model in choices("model"):  # whose micro-batches each regime divides into
        config = made(f"model={model}")
        for regime in regimes:
            check(replace(config, regime=replace(regime, learning_rate=1e-6)))


def test_the_authors_recipes_differ_from_their_bases_by_the_selection(composed):
    for algo, base in (("capo", "grpo"), ("dr_capo", "dr_grpo"), ("rein_capo", "reinforce")):
        ours, theirs = composed(f"algo={algo}").algo, composed(f"algo={base}").algo
        different = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
        assert different - {"label", "colour", "marker"} == {"name", "selection"}


def change(config, override):
    """Sets one value as the command line would: composing anew for each costs a third of a second."""
    node: Any = config
    given = OverridesParser.create().parse_override(override)
    *groups, name = given.key_or_group.split(".")
    for group in groups:
        node = node[group] if isinstance(node, dict) else getattr(node, group)
    if isinstance(node, dict):
        node[name] = given.value()
    else:
        setattr(node, name, given.value())
    return config


@pytest.mark.parametrize(
    "override",
    [
        "num_steps=0", "seed=-1", "device=gpu", "experiment_name=../x", "output_dir=''",
        "regime.learning_rate=inf", "regime.learning_rate=nan", "regime.learning_rate=1e30",
        "regime.group_size=1", "model.micro_batch_size=36", "model.compute_dtype=fp8",
        "model.attn_implementation=flash", "model.attn_implementation=org/kernel",
        "model.path=Qwen2.5-0.5B", "model.path=./nothing/here", "model.path=pkg://capo_exp/assets/nothing",
        "model.revision=abc", "model.name=a/b", "dataset.template=x", r"dataset.template='{problem}\nA:'",
        "dataset.eval_split=../x", "dataset.examples=[{problem: 1+1?}]", "dataset.source.num_train=0",
        "rollout.temperature=0",
        "rollout.temperature=1e-30", "rollout.top_p=1.1", "rollout.top_k=1025", "rollout.server_url=start",
        "rollout.engine.max_sequences_per_call=0", "curvature.top_k=1025", "curvature.optimizer_model=lion",
        "optimizer.betas=[0.9]", "optimizer.betas=[0.9, 1.0]", "optimizer.eps=1e-300",
        "optimizer.warmup_ratio=1", "evaluation.samples=2", "evaluation.num_problems=10000000000000",
        "reward.format_weight=1", "reward.length_weight=inf", "logger.tags=['']", "logger.project=a/b",
        "logger.histograms_every=15", "distributed.processes=2", "algo.num_minibatches=97",
        "dataset.source.answer_format=boxed | algo=grpo dataset=math",
        "algo.num_minibatches=2 | algo=rebel",
        "algo.reference_reset_every=5", "algo.label='a\nb'", "algo.colour=red", "algo.marker=oo",
        "algo.selection.policy_shift_max=-1", "algo.selection.policy_shift_max=nan",
        "algo.selection.policy_shift_max=many", "algo.selection.objective_shift_min=1",
        "algo.token_loss.clip_eps_low=-0.1", "algo.advantage.eps=0", "algo.selection._target_=os.system",
        "reward.verifier._target_=os.system", "rollout.correction._target_=os.system",
        "model.max_tokens_per_micro_batch=100",
        "model.share_prompts=true | model.pack=true",
        "curvature.diagnose_every=5 | algo=grpo step_rule=predicted",
        "model.pack=true | model.compile=true", "model.share_prompts=true | model.compile=true",
        "model.attn_implementation=eager | model.pack=true",
        "algo.step_rule.policy_shift_max=0 | algo=grpo step_rule=calibrated",
        "algo.step_rule.completions=-3 | algo=grpo step_rule=calibrated",
        "algo.step_rule.max_looks=0 | algo=grpo step_rule=calibrated",
        "algo.step_rule.memory_share=7 | algo=grpo step_rule=calibrated",
        "algo.selection.token.policy_shift_max=-1 | algo=grpo selection=levels",
        "rollout.correction.ratio_cap=inf | rollout/correction=token_truncation",
        "rollout.correction.ratio_high=0.9 | rollout/correction=token_mask",
        "rollout.engine.gpu_memory_utilization=0 | rollout=vllm",
        "model.attn_implementation=flash_attention_2 | device=cpu",
        "curvature.moments_dtype=bfloat16 | curvature.optimizer_model=sgd",
        "optimizer.betas=[0.0,0.999] | curvature.betas=[0.9,0.999] curvature.optimizer_model=adam_live",
        "rollout.correction._target_=capo_exp.algorithms.correction.mask_tokens"
        " | rollout=demonstrations rollout/correction=token_mask",
        "dataset.source.num_train=1000000000000",
        "dataset.source.num_eval=5001 | dataset=keywords model=keywords",
        "dataset.source.language.follow_share=1.1 | dataset=keywords model=keywords",
        "dataset.source.language.fewest_words=0 | dataset=keywords model=keywords",
        "rollout.server_url=node7 | rollout=vllm",
        "rollout.engine.max_model_len=100 | rollout=vllm",
        "rollout.temperature=2.5 | rollout=vllm",
        "rollout.engine.tensor_parallel_size=2 | rollout=vllm",
        "rollout.engine.sleep_level=3 | rollout=vllm",
        "rollout.engine.kv_cache_gib=abc | rollout=vllm",
        "rollout.engine.kv_cache_gib=inf | rollout=vllm",
        "rollout.engine.kv_cache_gib=0 | rollout=vllm",
        "rollout.engine.model_path=null | rollout=vllm",
        "rollout.engine.visible_devices='a b' | rollout=vllm",
        "rollout.engine.max_probe_difference=0.1 | rollout=vllm",
        "reward.verifier.timeout_seconds=0 | reward=math_verify",
        "reward.verifier.workers=0 | reward=math_verify",
        "reward.verifier.memory_limit_gib=0.001 | reward=math_verify",
        "reward.verifier.style=strict | reward=math_verify",
        "reward.verifier.unparsable_gold=two | reward=math_verify",
    ],
)  # fmt: skip
def test_refused_in_one_line_that_names_the_key(composed, override):
    given, _, others = override.partition(" | ")
    message = one_line(lambda: check(change(composed(*others.split()), given)))
    assert "expected" in message
    key = {"dataset.examples": "dataset.examples[0]"}.get(name := given.partition("=")[0], name)
    assert message.startswith(f"{key}=")


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("algo.aggregation", "algorithms.neutral.keep_all"),
        ("algo.selection", "algorithms.neutral.full_step"),
        ("rollout.correction", "algorithms.kl.kl_k3"),
        ("reward.verifier", "rollout.hf.HFRollout"),
        ("dataset.source", "algorithms.neutral.keep_all"),
    ],
)
def test_a_part_of_another_kind_is_refused(composed, key, target):
    config = composed("algo=grpo")
    group, name = key.split(".")
    setattr(getattr(config, group), name, {"_target_": f"capo_exp.{target}", "_partial_": True})
    with pytest.raises(
        ConfigError, match=rf"^{key}(\._target_=capo_exp\.{target}: expected a part that is|\.max_se)"
    ):
        check(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["regime.group_size=1", "algo=reinforce"],
        ["regime.prompts_per_step=1"],  # smaller than the micro-batch: one micro-batch
        ZERO_BETA,
        ["evaluation.samples=4", "evaluation.temperature=0.6"],
        ["algo.label='GRPO, mine'", "algo.colour='#00aaFF'", "algo.marker='*'"],
    ],
)
def test_unusual_but_possible(composed, overrides):
    check(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+foo=1"], f"foo=1: unknown key; expected one of {len(KEYS)} choices"),
        (["~seed"], "seed: no value; expected an integer"),
        (["regime.learning_rate=${nope}"], "regime.learning_rate: Interpolation key 'nope' not found"),
    ],
)
def test_what_gets_past_hydra_is_still_refused(overrides, message):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("config", overrides)
    with pytest.raises(ConfigError) as error:
        to_config(cfg)
    assert str(error.value).startswith(message)


def schema_fields(schema=TrainConfig, prefix=""):
    """Yields the dotted key, kind and field of every key."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        yield f"{prefix}{field.name}", hints[field.name], field
        if is_dataclass(hints[field.name]):
            yield from schema_fields(hints[field.name], f"{prefix}{field.name}.")


def test_every_number_has_its_range_beside_its_field():
    numbers = {key: field for key, kind, field in schema_fields() if kind in NUMBERS}
    assert len(numbers) >= 50
    assert not [key for key, field in numbers.items() if not isinstance(field.metadata.get("range"), Rule)]
    for key, kind, field in schema_fields():
        assert set(field.metadata) <= {"range", "result", "like"}, key
        if "range" in field.metadata and field.default is not MISSING and kind in (int, float, str):
            assert field.metadata["range"].holds(field.default), key


def test_what_changes_no_result_says_so():
    """All else is part of a run's identity."""
    unimportant = {key for key, _, field in schema_fields() if not field.metadata.get("result", True)}
    assert unimportant == {
        "algo.label", "algo.colour", "algo.marker", "dataset.prompt_style", "rollout.server_url", "logger",
        "checkpoint", "sweep", "stop_after_unrewarded", "experiment_name", "output_dir", "overwrite",
        "plan_only", "plugins", "allow_overcommit", "curvature.kernel", "distributed.name",
        "distributed.nodes", "distributed.processes", "distributed.timeout_seconds",
    }  # fmt: skip


def test_find_parts_sees_what_is_hidden(composed):
    """At any depth, in lists, and where no part is read; by any of the keys that Hydra would act on."""
    config = composed()
    before = {key for key, _ in find_parts(config)}
    config.dataset.examples = [{"problem": "", "solution": [{"deep": [{"_target_": "os.system"}]}]}]
    config.dataset.source["families"] = {"evil": {"_args_": []}, "worse": ({"x": {"_partial_": True}},)}
    found = {key for key, _ in find_parts(config)} - before
    families = {"dataset.source.families.evil", "dataset.source.families.worse[0].x"}
    assert found == families | {"dataset.examples[0].solution[0].deep[0]"}
