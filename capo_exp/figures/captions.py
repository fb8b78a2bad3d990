"""What a reader has to know beside the picture: seeds, band, smoothing, lines, and what is missing."""

from capo_exp.figures.compose import Picture
from capo_exp.figures.measure import y_label
from capo_exp.figures.study import Study, alpha, start_of

INTERVALS = {
    "bootstrap": "95 % bootstrap interval over seeds",
    "t": "95 % interval of Student's t over seeds",
    "sem": "one standard error over seeds",
}
STATISTICS = {"mean": "mean", "iqm": "interquartile mean"}


def caption(picture: Picture, study: Study) -> str:
    """All sentences."""
    left_out = [f"Left out: {text}." for text in picture.lacking]
    how = footer(picture, study)
    parts = [picture.spec.caption.strip(), f"{how[0].upper()}{how[1:]}.", *lines(picture, study), *left_out]
    return " ".join(part for part in parts if part)


def footer(picture: Picture, study: Study) -> str:
    """The shortest version, which stands in the picture itself."""
    kinds = {panel.spec.draw for panel in picture.panels}
    if kinds <= {"settings"}:
        return seeds(picture)
    if kinds <= {"tokens"}:
        return f"counted in the logged completions of {seeds(picture)}"
    several = any(len(curve.runs) > 1 for curve in picture.curves)
    mark = "whisker: " if kinds <= {"bars"} else "" if kinds <= {"heat", "stages"} else "band: "
    band = f"{mark}{INTERVALS[study.interval]}" if several else "one seed, hence no interval"
    text = f"{STATISTICS[study.statistic]} of {seeds(picture)}; {band}; {smoothing(picture, study)}"
    return text.removesuffix("; ")


def seeds(picture: Picture) -> str:
    """Such as `n = 5 seeds` or `n = 5 seeds (GRPO 3)`."""
    counts = {curve.label: len(curve.runs) for curve in picture.curves}
    usual = max(counts.values(), key=list(counts.values()).count)
    others = [f"{label} {count}" for label, count in counts.items() if count != usual]
    return f"n = {usual} seed{'' if usual == 1 else 's'}" + (f" ({', '.join(others)})" if others else "")


def smoothing(picture: Picture, study: Study) -> str:
    """Such as `EMA 0.1`, or `not smoothed`; one for each panel if they differ."""
    specs = [panel.spec for panel in picture.panels if panel.spec.draw in ("lines", "bars", "heat")]
    weights = {y_label(spec): alpha(study, spec) for spec in specs}
    said = {key: "not smoothed" if weight == 1 else f"EMA {weight:g}" for key, weight in weights.items()}
    if len(set(said.values())) <= 1:
        return "".join(dict.fromkeys(said.values()))
    return ", ".join(f"{text} ({key})" for key, text in said.items())


def lines(picture: Picture, study: Study) -> list[str]:
    """What the dashed lines, rings and the start point are, if there are any."""
    panels = [panel for panel in picture.panels if panel.spec.draw == "lines"]
    wanted = any(panel.spec.reference != "none" for panel in panels)
    levels = dict.fromkeys(level.label for panel in panels for level in panel.levels)
    started = any(start_of(study, c, p.spec) is not None for p in panels for c in picture.curves[:1])
    early = dict.fromkeys(text for panel in panels for text in panel.short)
    return [
        f"Dashed: {', '.join(levels)}." if levels else "",
        "No line of a reference: the runs have no conservative GRPO."
        if wanted and study.reference is None else "",
        "Ring and factor: the reference's x over that of the curve where each first reaches the line."
        if any(panel.crossings for panel in panels) else "",
        "x = 0 of training accuracy: runs at learning rate 0." if started else "",
        f"Seeds that end earlier than the others: {', '.join(early)}." if early else "",
    ]  # fmt: skip
