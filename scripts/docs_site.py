"""What `mkdocs` adds to docs/: the pages of the repository's root, and the reference of the configuration."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import omegaconf

from capo_exp.config.schema import TrainConfig, conf_dir, expected_type

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "outputs/reference/paper_figure_1-tiny/figures/1.png"
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
HEAD = """# Configuration

Every key of `python -m capo_exp`, from `capo_exp/config/schema.py`. A key with a neutral value does nothing
there, and a YAML may leave it out. Each part (a key with a `_target_`) takes the numbers of its function.
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages; mkdocs calls it."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PICTURE, abs_src_path=str(ROOT / PICTURE)))
    texts = {name: (ROOT / file).read_text(encoding="utf-8") for name, file in PAGES.items()}
    for name, text in (texts | {"CONFIG.md": config_page()}).items():
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keeps the words of a link to a file outside docs/, which a site does not have; mkdocs calls it."""
    markdown = markdown.replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md")
    folders = "conf|outputs|examples|capo_exp|scripts|tests|CITATION|LICENSE"
    return re.sub(rf"(?<!!)\[([^]]+)\]\((?:\.\./)*(?:{folders})[^)]*\)", r"\1", markdown)


def config_page() -> str:
    """Returns the page: a table for each group of keys, and the group's choices."""
    text, groups = HEAD, {"": TrainConfig} | dict(_groups())
    for group, schema in groups.items():
        prefix = f"{group}." if group else ""
        rows = "".join(_row(prefix, item, schema) for item in fields(schema) if item.name not in groups)
        choices = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) if group else []
        chosen = f"\nChoices of `{group}=`: {', '.join(choices)}.\n" if choices else ""
        title = group or "In no group"
        text += f"\n## {title}\n{chosen}\n| key | expected | neutral | meaning |\n|---|---|---|---|\n{rows}"
    return text


def _groups() -> Iterator[tuple[str, type]]:
    for name, kind in get_type_hints(TrainConfig).items():
        if is_dataclass(kind):
            yield name, kind  # pyright: ignore[reportReturnType]


def _row(prefix: str, item: Field[Any], schema: type) -> str:
    rule = item.metadata.get("range")
    expected = rule.expected if rule else expected_type(prefix + item.name)
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if isinstance(default, dict):
        default = str(default["_target_"]).removeprefix("capo_exp.")
    neutral = "" if default in (MISSING, omegaconf.MISSING) else f"`{'null' if default is None else default}`"
    cells = (f"`{prefix}{item.name}`", expected, neutral, _meaning(item.name, schema))
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def _meaning(name: str, schema: type) -> str:
    """Returns the comments at a field's line and on the lines before it."""
    lines = inspect.getsource(schema).splitlines()
    place = next(i for i, line in enumerate(lines) if re.match(rf"\s+{name}:", line))
    first = place
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    said = [line.strip() for line in lines[first:place]] + re.findall(r"#.*", lines[place])
    return " ".join(text.removeprefix("#").strip() for text in said)
