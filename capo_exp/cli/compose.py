"""`python -m capo_exp`: compose the configuration, check it, show the plan, train.

Composing, help and completion import no torch. Whatever is wrong with the configuration ends in one line on
stderr and exit status 2; HYDRA_FULL_ERROR=1 shows where it comes from.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.utils import env_override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.schema import conf_dir, expected_type, register
from capo_exp.sweep import sweep
from capo_exp.sweep.job import FULL_ERROR, report

COMPLETION = """\
_capo_exp_complete() {
    [[ "$COMP_LINE" == *" -m capo_exp "* ]] || return
    local words=($COMP_LINE)
    local query="${words[0]} -m capo_exp -sc query=bash"
    local choices=$(COMP_LINE="$COMP_LINE" COMP_POINT=$COMP_POINT $query 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _capo_exp_complete python python3
"""
"""Hydra's own completion knows `python file.py` and installed programs, not `python -m`."""


def main() -> None:
    """Runs the command line; always ends in SystemExit unless all went well."""
    register()
    for flag in ("-m", "--multirun"):  # Hydra's parser takes it only before or after all overrides
        if flag in sys.argv[1:]:
            sys.argv.remove(flag)
            sys.argv.insert(1, flag)
    if "-sc" in sys.argv[1:] and "install=bash" in sys.argv[1:]:
        sys.stdout.write(COMPLETION)
        return
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = re.sub(r" -m\s+capo_exp(?=\s|$)", " capo_exp.py", os.environ["COMP_LINE"])
    sys.argv[1:] = map(choose_by_slash, sys.argv[1:])
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(sweep.task)
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # else Hydra prints and exits itself
            app()
    except sweep.JobFailed as failed:
        raise SystemExit(failed.status) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Composing failed: jobs report for themselves.
        raise SystemExit(report(error if FULL_ERROR else ConfigError(condense(error)))) from None
    finally:
        sweep.conclude()


def choose_by_slash(argument: str) -> str:
    """`rollout.correction=token_mask` as Hydra wants the choice of a nested group: with a slash."""
    key, equals, value = argument.partition("=")
    group = key.replace(".", "/")
    chosen = equals and "." in key and not value.startswith("{") and _is_group(group)
    return f"{group}={value}" if chosen else argument


def condense(error: Exception) -> str:
    """What was wrong with the command line or a YAML, in one line: key, value, what is expected."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value; {' '.join(text.splitlines()[0].split())}"
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if text.startswith("Config group override"):  # algo=null: Hydra does not name it
        given = next((a for a in sys.argv[1:] if a.endswith("=null")), "")
        return f"{given}: expected one of {', '.join(_choices(given.partition('=')[0]))}"
    if match := re.match(r"Error merging override (\+*)([^=]+)=(.*)", text):
        expected = expected_type(match[2]) or _first_line(error.__cause__ or error)
        return f"{match[2]}={match[3]}: expected {expected}"
    if match := re.search(r"full_key: (\S+)", text):
        if re.search(r"Key '\S+' not in '", text):
            return f"{_unknown_key(match[1])} ({text.partition(':')[0]})"  # In 'experiment/x'
        kind = expected_type(match[1])
        return f"{match[1]}: {_first_line(error)}" + (f"; expected {kind}" if kind else "")
    return _first_line(error)


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _first_line(error)
    # A nested choice, experiment=paper/x: the group is the part that Hydra was asked for.
    top = group if _is_group(group) else group.split("/")[0]
    choice = f"{group}/{choice}".removeprefix(f"{top}/")
    every: set[str] = {*_choices(top), *(error.options or [])}
    known = sorted(name for name in every if "/_" not in f"/{name}")  # _x is part of others' recipes
    return f"{top}={choice}: unknown choice; {suggest(choice, known)}"


def _choices(group: str) -> list[str]:
    folder = conf_dir() / group
    names = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    return sorted(n for n in names if "/" not in n or not _is_group(f"{group}/{n}".rpartition("/")[0]))


def _is_group(folder: str) -> bool:
    """Whether a folder of conf/ is a group of its own, as rollout/correction is, for the schema has its key;
    those of experiment/ only sort its choices."""
    return (conf_dir() / folder).is_dir() and bool(expected_type(folder.replace("/", ".")))


def _unknown_key(key: str) -> str:
    given = next((a for a in sys.argv[1:] if a.partition("=")[0] == key), key)
    known = _known_keys()
    if key in known:  # a sweep whose jobs have different keys
        return f"{given}: expected a key of every job of the sweep; sweep it with the choices that have it"
    parent, _, name = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    names = [k.rpartition(".")[2] for k in siblings]
    meant = [f"{parent}.{n}".lstrip(".") for n in difflib.get_close_matches(name, names, n=1)]
    if near := meant or same_name:
        return f"{given}: unknown key; nearest: {near[0]}"
    return f"{given}: unknown key; {suggest(name, names or [k for k in known if '.' not in k])}"


def _known_keys() -> list[str]:
    """The keys of the configuration that the command line's group choices compose."""
    plain = [a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w/]+", a)]
    choices = [a for a in plain if (conf_dir() / a.partition("=")[0]).is_dir()]
    for attempt in (
        choices,
        [],
    ):  # the second for a choice that does not compose or is on another search path
        compose_here = hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir()))
        with contextlib.suppress(HydraException), compose_here:
            return list(_dotted(OmegaConf.to_container(hydra.compose("config", attempt))))
    return []


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    for name, child in node.items():
        yield f"{prefix}{name}"
        if isinstance(child, dict):
            yield from _dotted(child, f"{prefix}{name}.")


def _first_line(error: BaseException) -> str:
    """The message without Hydra's and OmegaConf's further lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = ("full_key", "object_type", "reference_type", "Config search path", "provider=", "See http")
    text = "; ".join(line for line in lines if not line.startswith(details)) or type(error).__name__
    return text.replace(":;", ":")
