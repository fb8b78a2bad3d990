"""`python -m capo_exp.figures runs=DIR figure=all`: figures and tables from logged runs. Imports no torch."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from capo_exp.config.errors import ConfigError
from capo_exp.figures import picture as page
from capo_exp.figures import provenance, style, tables
from capo_exp.figures.captions import caption, footer
from capo_exp.figures.catalogue import FigureSpec, figure_names, find_figure
from capo_exp.figures.command import Command, as_typed, help_text, parse, smoothing
from capo_exp.figures.compose import Picture, compose
from capo_exp.figures.curves import curves
from capo_exp.figures.drawn import Drawn
from capo_exp.figures.intervals import Interval, Statistic
from capo_exp.figures.study import Study
from capo_exp.runs.files import replace_file
from capo_exp.runs.read import find_runs, load_run, to_its_end


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; returns the exit status: 2 for bad input, or if a figure that was asked for cannot be drawn."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(given):
        sys.stdout.write(help_text())
        return 0
    try:
        return run(parse(given), as_typed(given))
    except (ConfigError, OSError) as error:  # also a full disk
        sys.stderr.write(f"{error}\n")
        return 2


def run(command: Command, typed: str) -> int:
    """Draws what the command asks for."""
    every = command.figure == ["all"]
    specs = [adapted(find_figure(name), command) for name in (figure_names() if every else command.figure)]
    paths = find_runs(command.runs)
    study = study_of(command, paths)
    output = folder(Path(command.output) if command.output else common_parent(paths) / "figures")
    drawn: list[Drawn] = []
    for spec in specs:
        try:
            drawn.append(draw(spec, study, output, typed))
            sys.stdout.write(f"figure {spec.name}: {drawn[-1].png}\n")
        except ConfigError as error:
            stream = sys.stdout if every else sys.stderr
            stream.write(f"figure {spec.name}: {'skipped, ' if every else ''}{error}\n")
    if command.report == "html":
        from capo_exp.figures.report import write_report

        sys.stdout.write(f"report: {write_report(study.runs, study.curves, drawn, output)}\n")
    return 0 if len(drawn) == len(specs) or (drawn and every) else 2


def folder(path: Path) -> Path:
    """The path, made if need be.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={path}: no folder can be made there ({error.strerror})") from error
    return path


def adapted(spec: FigureSpec, command: Command) -> FigureSpec:
    """The figure with what the command line says about it: keys of `metrics`."""
    if spec.name != "metrics" or not command.keys:
        return spec
    blank = replace(spec.panels[0], y_label="", log=False, unit="number")
    source = {True: "eval", False: "metrics"}
    panels = [
        replace(blank, title=k, key=k, source=source[k.startswith(("eval/", "test/"))]) for k in command.keys
    ]
    return replace(spec, panels=panels)


def study_of(command: Command, paths: Sequence[Path]) -> Study:
    """The runs, loaded.

    Raises:
        ConfigError: a file is damaged, or the runs cannot be compared.
    """
    runs = tuple(to_its_end(load_run(path)) for path in paths)
    return Study(
        runs=runs,
        curves=tuple(curves(runs, mix=command.mix)),
        statistic=cast(Statistic, command.statistic),
        interval=cast(Interval, command.interval),
        smoothing=smoothing(command),
        x=command.x,
    )


def common_parent(paths: Sequence[Path]) -> Path:
    """The folder that all runs are in; of one run, the run itself."""
    alike = len({path.is_absolute() for path in paths}) == 1
    return Path(os.path.commonpath(paths if alike else [path.absolute() for path in paths]))


def draw(spec: FigureSpec, study: Study, output: Path, command: str) -> Drawn:
    """Computes, draws and writes one figure.

    Raises:
        ConfigError: the runs do not have what it shows, or a file of theirs is damaged.
    """
    picture = compose(spec, study)
    contents, drawn = render(picture, study, output, command)
    write(contents)
    return drawn


def render(picture: Picture, study: Study, output: Path, command: str) -> tuple[dict[Path, bytes], Drawn]:
    """The files of a figure with their contents, none of them written yet."""
    spec, says = picture.spec, caption(picture, study)
    origin = provenance.provenance(picture, study, command)
    with style.house_style():
        figure = page.draw(picture, study, footer(picture, study))
        png = page.as_bytes(figure, "png", provenance.png_metadata(origin, spec.title))
        pdf = page.as_bytes(figure, "pdf", provenance.pdf_metadata(origin, spec.title))
    table = tables.summary(picture.panels)
    markdown = tables.markdown(table)
    files = {
        ".png": png,
        ".pdf": pdf,
        ".csv": (provenance.comments(origin, "#") + tables.csv_text(picture.panels)).encode(),
        ".md": f"{provenance.markdown_comment(origin)}\n## {spec.title}\n\n{markdown}\n{says}\n".encode(),
        ".tex": (provenance.comments(origin, "%") + tables.latex(table) + f"% {says}\n").encode(),
    }
    paths = {suffix: output / f"{spec.name}{suffix}" for suffix in files}
    drawn = Drawn(
        name=spec.name, title=spec.title, caption=says, markdown=markdown,
        png=paths[".png"], pdf=paths[".pdf"], csv=paths[".csv"],
    )  # fmt: skip
    return {paths[suffix]: content for suffix, content in files.items()}, drawn


def write(contents: dict[Path, bytes]) -> None:
    """All of the files or, whatever goes wrong, none of them."""
    with ExitStack() as stack:
        partial = {path: stack.enter_context(replace_file(path)) for path in contents}
        for path, content in contents.items():
            partial[path].write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main())
