"""The command line of every command: Hydra's flags and key=value, read by Hydra itself.

`run_training` runs Hydra's application, which also sweeps. `run_command` lets Hydra compose one
configuration, checks it against a schema and hands the typed values to a command. Whatever is wrong ends in
one line on stderr and exit status 2; HYDRA_FULL_ERROR=1 shows where it comes from. None of it imports torch.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from capo_exp.cli.errors import in_one_line
from capo_exp.cli.words import (
    FLAGS,
    SWEEP_FLAGS,
    as_overrides,
    choose_by_slash,
    choose_engine,
    find_folders,
    refuse_endless,
    split_flags,
    write_value,
)
from capo_exp.config.checks import check_ranges
from capo_exp.config.choices import refuse_sweep
from capo_exp.config.errors import ConfigError
from capo_exp.config.places import quoted
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.sweep import sweep
from capo_exp.sweep.job import SHORT_ERRORS, execute, full_error, report

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
QUIET = {
    "defaults": [{"override hydra/hydra_logging": "none"}, {"override hydra/job_logging": "none"}],
    "hydra": {"output_subdir": None, "run": {"dir": "."}, "job": {"chdir": False}},
}
"""What makes Hydra write no folder and no log."""


@dataclass(frozen=True)
class CommandLine:
    """What the command line of one command is made of."""

    config: str
    """conf/CONFIG.yaml holds the keys and their defaults."""
    schema: type
    """Frozen dataclass with their types, and ranges in the fields' metadata; its `config_dir` receives
    the folder of --config-dir."""
    usage: Callable[[], str]
    """Returns the text of --help; `{keys}` in it stands for the keys with their defaults and meanings."""
    others: tuple[str, ...] = ()
    """Beginnings of keys of the training configuration; such overrides go into the field `overrides`."""
    words: str = ""
    """Key, a list, that takes arguments without `=`."""


def run_training() -> int:
    """Runs `python -m capo_exp` and returns its exit status."""
    arguments = sys.argv[1:]
    if {"-sc", "--shell-completion"} & set(arguments) and "install=bash" in arguments:
        sys.stdout.write(COMPLETION)
        return 0
    if "--version" in arguments:
        sys.stdout.write(f"capo_exp {version('capo_exp')}\n")
        return 0
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = re.sub(r" -m\s+capo_exp(?=\s|$)", " capo_exp.py", os.environ["COMP_LINE"])

    def call() -> None:
        flags, words = split_flags(arguments, SWEEP_FLAGS)
        register()
        try:
            overrides = as_overrides(words, *find_folders(flags)[-1:])
            if "--multirun" in flags:
                with in_one_line():
                    refuse_endless(overrides)
            with redirect_stderr(_Told(sys.stderr)) if "--multirun" in flags else nullcontext():
                _call_hydra(task, "config", TrainConfig, [*overrides, *flags])
        except OSError as failed:
            if failed.filename is None or "--multirun" not in flags:
                raise
            wanted = "expected output_dir to be a directory that can be written"
            raise ConfigError(f"{failed.filename}: {failed.strerror}; {wanted}") from failed

    status = 1
    try:
        status = exit_status(call)
    finally:
        ran = sweep.conclude()
    if ran or status:
        return status
    sys.stderr.write(
        "no job: expected values to sweep over, which range(0) or a glob without a match has not\n"
    )
    return 2


class _Told(TextIOBase):
    """A stream without Hydra's line on the first job that failed, which is told already."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fileno, self.isatty, self.flush = stream.fileno, stream.isatty, stream.flush

    def write(self, text: str) -> int:
        return len(text) if text.startswith("Error executing job with") else self._stream.write(text)


def task(cfg: DictConfig) -> float | None:
    """What Hydra calls: once for a run, once for each job of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.run_job(cfg)
    try:
        execute(to_config(cfg), draw_run)
    except Exception as raised:
        raise SystemExit(report(raised)) from None
    return None


def draw_run(directory: Path) -> list[Path]:
    """Draws the picture of a run and its report; matplotlib is imported when it is needed."""
    from capo_exp.cli.figures import draw_one

    return draw_one(directory)


def run_command(task: Callable[[Any], int], line: CommandLine, arguments: Sequence[str] | None = None) -> int:
    """Composes one configuration, runs a command with it and returns the exit status.

    Args:
        task: (typed configuration) -> exit status.
        line: what the command takes.
        arguments: in place of those of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(given):
        sys.stdout.write(line.usage().replace("{keys}", _keys(line.config)))
        return 0
    return exit_status(lambda: None if (typed := compose_command(line, given)) is None else task(typed))


def compose_command(line: CommandLine, arguments: Sequence[str]) -> Any:
    """Returns the typed configuration of a command; None after --cfg or --info, which only show it.

    Raises:
        ConfigError: something is wrong with it.
    """
    found: list[tuple[DictConfig, dict[str, Any]]] = []

    def compose(config: DictConfig) -> None:
        found.append((config, dict(HydraConfig.get().sweeper.params or {})))

    flags, words = split_flags(arguments, FLAGS)
    register()
    if line.schema is TrainConfig:
        overrides = [*as_overrides(words, *find_folders(flags)[-1:]), *flags]
    else:
        _store(line)
        overrides = _as_hydra(flags, words, line)
    _call_hydra(compose, line.config, line.schema, ["hydra.mode=RUN", *overrides])
    if not found:
        return None
    config, swept = found[0]
    refuse_sweep(swept, arguments)
    with in_one_line(line.schema):
        typed = to_config(config) if line.schema is TrainConfig else OmegaConf.to_object(config)
    if line.schema is not TrainConfig:
        check_ranges(typed)
    return typed


def exit_status(call: Callable[[], int | None]) -> int:
    """Calls, turns an error into a message on stderr, and returns the exit status."""
    try:
        status = call() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `--help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except sweep.JobFailed as failed:
        return failed.status
    except KeyboardInterrupt:
        return 130
    except Exception as raised:
        return report(raised)


def make_folder(path: Path) -> None:
    """Makes the folder of output=."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failed:
        raise ConfigError(f"output={path}: no folder can be made there ({failed.strerror})") from failed


def _store(line: CommandLine) -> None:
    """Makes the command's configuration known to Hydra.

    conf/ is not on the search path then, for a key such as `model` would be a group there.
    """
    schema = OmegaConf.structured(line.schema)
    OmegaConf.set_readonly(schema, False)  # as one made of a frozen dataclass is, which YAML could not fill
    values = OmegaConf.load(conf_dir() / f"{line.config}.yaml")
    assert isinstance(values, DictConfig)
    defaults = [f"{line.config}_schema", "_self_", *QUIET["defaults"]]
    store = ConfigStore.instance()
    store.store(name=f"{line.config}_schema", node=schema)
    store.store(name=f"{line.config}_command", node={**values, "hydra": QUIET["hydra"], "defaults": defaults})


def _call_hydra(task: Callable[[DictConfig], Any], config: str, schema: type, arguments: list[str]) -> None:
    first, where = [], (None, f"{config}_command")
    if schema is TrainConfig:  # Hydra looks into the folder of --config-dir last: a user's file comes first
        own = [Path(folder).absolute() for folder in find_folders(arguments)[-1:]]
        where = (str((*own, conf_dir())[0]), config)
        first = [f"--config-dir={conf_dir()}"] if own else []
        arguments = [*(each for each in arguments if not each.startswith("--config-dir=")), *first]
    application = hydra.main(*where, version_base="1.3")(task)
    # Without the first variable Hydra would print and exit itself; the second says what the user wants.
    variables = {"HYDRA_FULL_ERROR": "1", SHORT_ERRORS: "" if full_error() else "1"}
    with argv(arguments), in_one_line(schema), env_override(variables):
        application()


@contextmanager
def argv(arguments: Sequence[str]) -> Iterator[None]:
    """Lets a command see these words as those of its process, which its messages name."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _keys(config: str) -> str:
    """Returns the lines of conf/CONFIG.yaml below its defaults list, which say what each key means."""
    text = (conf_dir() / f"{config}.yaml").read_text(encoding="utf-8")
    return re.sub(r"(?m)^", "  ", text.partition("\n\n")[2]).rstrip() + "\n"


def _as_hydra(flags: Sequence[str], words: Sequence[str], line: CommandLine) -> Iterator[str]:
    """Yields the arguments as Hydra's grammar wants them, which takes no bare path, comma or bracket."""
    kinds = get_type_hints(line.schema)
    lists: dict[str, list[str]] = {"overrides": [], line.words: []}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in kinds:
            yield f"{key}={write_value(kinds[key], value)}"
        elif key.lstrip("+").startswith(line.others or ("=",)):
            lists["overrides"].append(choose_by_slash(choose_engine(word, words)))
        elif line.words and not equals and word.strip():
            lists[line.words].append(word)
        else:
            yield choose_by_slash(word)
    yield from (f"{key}=[{','.join(map(quoted, values))}]" for key, values in lists.items() if values)
    for flag in flags:
        name, _, value = flag.partition("=")
        if name != "--config-dir":
            yield flag
        elif "config_dir" in kinds:
            yield f"config_dir={quoted(Path(value).absolute())}"
