"""README and PAPER_MAP are true: commands compose, metrics are listed, named functions and tests exist."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from capo_exp.config.checks import check
from capo_exp.config.schema import conf_dir, register, to_config
from capo_exp.runs.metrics import METRICS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.search(r"-m capo_exp(\.doctor)?(\s|$)", line)]
FIGURES = [line for line in LINES if "-m capo_exp.figures" in line]


def overrides_of(command: str) -> list[str]:
    """The key=value arguments of a command line; the first value of those that are swept."""
    words = shlex.split(command.partition("-m capo_exp")[2], comments=True)
    pairs = [word for word in words if "=" in word]
    parser = OverridesParser.create()
    return [
        f"{o.key_or_group}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in parser.parse_overrides(pairs)
        if o.input_line is not None
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_composes(command: str) -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        check(to_config(compose("config", overrides_of(command))))


def test_the_readme_lists_every_metric_and_nothing_is_left_to_fill_in() -> None:
    missing = [name for name, meaning in METRICS.items() if f"| `{name}` | {meaning} |" not in README]
    assert not missing
    assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|TABLE|TEXT)\b", README)


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), f"{document} links to {target}"


def test_the_paper_map_names_functions_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "PAPER_MAP.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 7]
    named = [name for row in rows[1:] for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", row[3])]
    assert len(named) >= 12
    for name in named:
        module, _, function = f"capo_exp.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), function), name
    for file, function in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, function
