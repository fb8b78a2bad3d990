"""Random overrides of random keys with random values: a configuration, or one line that names the fault."""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from capo_exp.cli.compose import compose_config, find_choices, guard
from capo_exp.cli.errors import in_one_line
from capo_exp.cli.words import choose_by_slash
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.plan import plan
from capo_exp.config.record import read_config, to_yaml
from capo_exp.config.schema import conf_dir, to_config
from capo_exp.runs.identity import run_dir

GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name[0] not in "_h")
LISTED = """
0 1 -1 2 7 0.5 1e-300 1e300 1e30 inf -inf nan 99999999999999999999 true false null '' ' ' x x/y ../x
/proc/x [] [1] [0.9,0.99] [x,null] {} {a:1} {_target_:os.system}
{_target_:capo_exp.algorithms.neutral.keep_all} {_partial_:false} ??? ${seed} ${nope} ${add:1}
${oc.env:HOME} \\${seed} модель 1_000 0x10 1e3 "quoted" 'a=b' a=b a:b
capo_exp.algorithms.neutral.keep_all capo_exp.grading.verifier.MathVerifier [[1]] [{a:b}]
{a:{b:[1]}} cuda:0 auto
"""
VALUES = [*LISTED.split(), " "]


def list_keys():
    """Returns every dotted key of some configurations, and some that are none."""
    found = {"nope", "algo.nope", "a.b.c", "algo.selection.x.y", "seed.x", "hydra.run.dir", ""}
    for overrides in ([], ["rollout=vllm"], ["algo=grpo", "selection=levels", "step_rule=calibrated"]):
        nodes = list(OmegaConf.to_container(compose_config(overrides)).items())
        for key, node in nodes:
            found.add(str(key))
            if isinstance(node, dict):
                nodes += [(f"{key}.{name}", child) for name, child in node.items()]
    return sorted(found)


@cache
def overrides():
    signs, keys = st.sampled_from(["", "", "", "", "+", "++", "~"]), st.sampled_from(list_keys())
    values = st.one_of(
        st.sampled_from(VALUES), st.integers().map(str), st.floats().map(str), st.text(max_size=5)
    )
    changed = st.builds("{}{}={}".format, signs, keys, values)
    chosen = st.sampled_from(GROUPS).flatmap(
        lambda group: st.sampled_from([*find_choices(group), "nope"]).map(lambda choice: f"{group}={choice}")
    )
    return st.one_of(changed, changed, chosen, st.builds("~{}".format, keys))


def judge(words):
    """Does what a command does before it loads anything; raises what is no ConfigError of one line."""
    try:
        with in_one_line():
            guard(words, [])
            cfg = compose_config([choose_by_slash(word) for word in words])
        config = to_config(cfg)
        check(config)
    except ConfigError as refused:
        assert "\n" not in str(refused) and len(str(refused)) < 1500, str(refused)
        return
    assert plan(config) and len(run_dir(config).name) < 256
    assert read_config(to_yaml(config), ["own=true"]) == config


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))  # of 300: files of few tests are begun last
def test_any_command_line_is_a_configuration_or_one_line(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @seed(part)
    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(overrides(), min_size=1, max_size=4))
    def fuzz(words):
        judge(words)

    fuzz()
    assert not list(tmp_path.iterdir())
