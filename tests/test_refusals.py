"""What methods with rollouts of their own cannot go with is refused in one line that names the key."""

import pytest

from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError

SFT = "algo=sft rollout=demonstrations regime.group_size=1"
BUDGET = "algo=c3po_pp regime.prompts_per_step=3 regime.group_size=2 dataset.max_completion_tokens=12"
PAIRED = "rollout=pairs regime.group_size=2 model.micro_batch_size=8"


PASSING = [f"algo={algo} {PAIRED}" for algo in ("dpo", "mdpo", "direct_advantage_po")]


@pytest.mark.parametrize("more", ["selection=capo", "step_rule=calibrated"])
@pytest.mark.parametrize("overrides", [SFT, BUDGET, *PASSING])
def test_what_they_begin_with_passes_whatever_is_selected(composed, overrides, more):
    check(composed(*overrides.split(), more))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "algo=a_star_po algo.reference_samples=0",
            "algo.reference_samples=0: expected .*(solved_by_r|optimal_advantage asks for reference_rewards)",
        ),
        (
            "algo=a_star_po algo.reference_reset_every=5",
            "algo.reference_reset_every=5: expected 0 with algo.reference_samples",
        ),
        (
            "algo=vineppo algo.continuations=0",
            "algo.continuations=0: expected .*whitened_step_advantages asks for state_values",
        ),
        ("algo=vineppo algo.states.pattern='('", r"algo.states.pattern=\(: expected a regular expression"),
        (f"{SFT} algo.continuations=2", "algo.continuations=2: expected 0 with rollout.train_engine"),
        (f"{SFT} algo.reference_samples=2", "algo.reference_samples=2: expected 0 with rollout.train_engine"),
        (f"{BUDGET} algo.rollout_tokens=5", "algo.rollout_tokens=5: expected null, or .* = 6, a token each"),
        (
            f"{BUDGET} algo.max_sampling_rounds=2",
            "algo.max_sampling_rounds=2: expected 1 with algo.rollout_tokens",
        ),
        (
            f"{BUDGET} rollout=demonstrations",
            "algo.rollout_tokens=36: expected null with rollout.train_engine",
        ),
        (f"{BUDGET} rollout=pairs", "algo.rollout_tokens=36: expected null with rollout.train_engine"),
        (f"{BUDGET} algo.max_age=0", "algo.max_age=0: expected an integer of at least 1"),
        ("rollout=demonstrations", "algo=capo: expected algo=sft regime.group_size=1 with rollout=demonstr"),
        ("algo=dapo algo.shaping.cache=1000", "algo.shaping.cache=1000: expected at most max_length=96"),
        ("algo=mdpo", "rollout=hf: expected rollout=pairs with algo.pair_levels"),
        (f"algo=dpo {PAIRED} regime.group_size=4", "regime.group_size=4: expected 2 with rollout=pairs"),
        (f"algo=dpo {PAIRED} algo.pair_levels=[step]", "algo.states._target_=.*where a step begins"),
        (f"algo=dpo {PAIRED} algo.pair_levels=[word]", r"algo.pair_levels=\['word'\]: expected a list of"),
        ("algo=dpo algo.num_minibatches=2", "algo.num_minibatches=2: expected 1 with algo=dpo"),
        ("algo=dpo rollout/correction=token_truncation", "rollout.correction.*of which the advantage"),
        (
            f"algo=dpo {PAIRED} rollout.train_engine.samples=1",
            "rollout.train_engine.samples=1: expected an integer of at least 2",
        ),
        (
            "algo=direct_advantage_po algo.pair_levels=[]",
            "algo.reference_samples=0: expected at least 1, or rollout=pairs",
        ),
    ],
)
def test_refused_in_one_line(composed, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        check(composed(*overrides.split()))
    assert "\n" not in str(error.value)
