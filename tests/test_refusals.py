"""What methods with rollouts of their own cannot go with is refused in one line that names the key."""

import re

import pytest

from capo_exp.config.checks import check
from tests.pieces import one_line

SFT = "algo=sft rollout=demonstrations regime.group_size=1"
BUDGET = "algo=c3po_pp regime.prompts_per_step=3 regime.group_size=2 dataset.max_completion_tokens=12"
PAIRED = "rollout=pairs regime.group_size=2 model.micro_batch_size=8"


PASSING = [f"algo={algo} {PAIRED}" for algo in ("dpo", "mdpo", "direct_advantage_po")]


@pytest.mark.parametrize("more", ["selection=capo", "step_rule=calibrated"])
@pytest.mark.parametrize("overrides", [SFT, BUDGET, *PASSING])
def test_what_they_begin_with_passes_whatever_is_selected(composed, overrides, more):
    check(composed(*overrides.split(), more))


OWN = (
    "algo=a_star_po algo.reference_samples=0", "algo=a_star_po algo.reference_reset_every=5",
    "algo=vineppo algo.continuations=0", "algo=vineppo algo.states.pattern='('",
    f"{SFT} algo.continuations=2", f"{SFT} algo.reference_samples=2", f"{BUDGET} algo.rollout_tokens=5",
    f"{BUDGET} algo.max_sampling_rounds=2", f"{BUDGET} algo.max_age=0",
    f"algo=dpo {PAIRED} regime.group_size=4", f"algo=dpo {PAIRED} algo.pair_levels=[word]",
    "algo=dpo algo.num_minibatches=2", f"algo=dpo {PAIRED} rollout.train_engine.samples=1",
)  # fmt: skip


@pytest.mark.parametrize("overrides", OWN)
def test_the_last_of_them_is_refused_by_its_key(composed, overrides):
    key = overrides.split()[-1].partition("=")[0]
    assert re.match(rf"{re.escape(key)}=.*: expected", one_line(lambda: check(composed(*overrides.split()))))


TARGET, AT_ONCE = "rollout.correction.*expected rollout/correction=none with algo", "algo.rollout_tokens=36"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (f"{BUDGET} rollout=demonstrations", f"{AT_ONCE}: expected null with rollout.train_engine"),
        (f"{BUDGET} rollout=pairs", f"{AT_ONCE}: expected null with rollout.train_engine"),
        ("rollout=demonstrations", "algo=capo: expected algo=sft regime.group_size=1 with rollout=demonstr"),
        ("algo=dapo algo.shaping.cache=1000", "algo.shaping.cache=1000: expected at most max_length=96"),
        ("algo=mdpo", "rollout=hf: expected rollout=pairs with algo.pair_levels"),
        (f"algo=dpo {PAIRED} algo.pair_levels=[step]", "algo.states._target_=.*where a step begins"),
        ("algo=dpo rollout/correction=token_truncation", "rollout.correction.*of which the advantage"),
        ("algo=rebel rollout/correction=token_truncation", TARGET),
        ("algo=quatro rollout/correction=token_truncation", TARGET),
        ("algo=direct_advantage_po algo.pair_levels=[]",
         "algo.reference_samples=0: expected at least 1, or rollout=pairs"),
    ],
)  # fmt: skip
def test_refused_in_one_line(composed, overrides, message):
    assert re.match(message, one_line(lambda: check(composed(*overrides.split()))))
