"""What drawing leaves behind, for whoever goes on with it (the report)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drawn:
    """One figure on disk."""

    name: str
    title: str
    caption: str
    """Seeds, band, smoothing, and what the figure lacks."""
    png: Path
    pdf: Path
    csv: Path
    """The plotted numbers."""
    markdown: str
    """The table, without comments."""
