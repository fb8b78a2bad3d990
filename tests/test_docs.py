"""The documents are true: commands compose, metrics are listed, named functions, tests and files exist."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from capo_exp.cli.compose import compose_config, guard
from capo_exp.cli.peers import PEERS
from capo_exp.cli.words import as_overrides
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.plugins import PLUGINS
from capo_exp.config.schema import to_config
from scripts.metrics_page import page

ROOT = Path(__file__).parents[1]
EXTENDING = ROOT / "docs" / "EXTENDING.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
TEXTS = {path: path.read_text() for path in DOCUMENTS}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.search(r"-m capo_exp(\.doctor)?(\s|$)", line)]


def overrides_of(command):
    """The key=value arguments of a command line; the first value of those that are swept."""
    words = shlex.split(command.partition("-m capo_exp")[2], comments=True)
    pairs = as_overrides([word for word in words if "=" in word])
    parser = OverridesParser.create()
    return [
        f"{o.key_or_group}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in parser.parse_overrides(pairs)
        if o.input_line is not None
    ]


@pytest.mark.slow
def test_every_command_of_the_documents_composes(monkeypatch):
    assert len(COMMANDS) > 15
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.chdir(ROOT)
    for folder in re.findall(r"PYTHONPATH=(\S+) ", "".join(LINES)):
        monkeypatch.syspath_prepend(ROOT / folder)
    commands = {tuple(overrides_of(command)): command for command in COMMANDS}
    for overrides, command in commands.items():
        folders = re.findall(r"--config-dir (\S+)", command)
        try:
            guard(overrides, folders)
            check(to_config(compose_config(overrides, config_dir=next(iter(folders), None))))
        except (ConfigError, HydraException) as error:
            raise AssertionError(f"{command}: {error}") from error


def test_the_code_of_the_page_on_extending_is_that_of_the_examples():
    blocks = re.findall(r"```(?:python|yaml)\n((?:def|name:) .*?)```", TEXTS[EXTENDING], re.DOTALL)
    files = [path for path in (ROOT / "examples").rglob("*.*") if path.suffix in (".py", ".yaml")]
    known = {line for path in files for line in path.read_text().splitlines()}
    assert len(blocks) == 3 and {line for block in blocks for line in block.splitlines()} <= known


def test_the_page_of_metrics_is_the_printed_one():
    assert (ROOT / "docs" / "METRICS.md").read_text() == page()


def test_the_page_for_users_of_trl_and_verl_says_what_an_unknown_key_says():
    rows = [line.split("|")[1:4] for line in TEXTS[ROOT / "docs" / "FROM_TRL.md"].splitlines()]
    named = {
        name.rpartition(".")[2]: here
        for trl, verl, here in filter(None, rows)
        for name in re.findall(r"`([\w.]+)`", trl + verl)
    }
    config = OmegaConf.create(compose_config([]))
    for name, key in PEERS.items():
        group, _, last = key.rpartition(".")
        assert last in (OmegaConf.select(config, group) if group else config), key
        if name != "batch_size":  # what many say
            assert last in re.findall(r"\w+", named[name]), name


def test_nothing_is_left_to_fill_in_and_the_readme_is_short():
    assert not re.findall(r"@@\w+@@|\b[A-Z]+_(?:OUTPUT|TABLE|TEXT)\b", "".join(TEXTS.values()))
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_every_file_that_the_documents_link_to_is_there():
    for document, text in TEXTS.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (document.parent / target).exists(), f"{document} links to {target}"


def test_the_paper_map_names_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "PAPER_MAP.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 7]
    named = [name for row in rows[1:] for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", row[3])]
    assert len(named) >= 12
    for name in named:
        module, _, function = f"capo_exp.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), function), name
    last = ""  # a name without a file is of the one before
    for file, function in re.findall(r"`(test_\w+\.py)?::(\w+)`", text):
        last = file or last
        tree = ast.parse((ROOT / "tests" / last).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, function
