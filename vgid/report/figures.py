"""The figures of a study, each as a page and as a picture."""

from pathlib import Path

from vgid.report.front_page import write_html
from vgid.report.insights import importances, write_insights_html, write_insights_png
from vgid.report.plots import Front, write_png

FIGURES = ("front.html", "front.png", "insights.html", "insights.png")


def write_figures(folder: Path, front: Front) -> list[Path]:
    """Write all figures of a study.

    Args:
        folder: where to.
        front: what they show.

    Returns:
        The files, in the order of ``FIGURES``.

    Raises:
        InputError: a file cannot be written.
    """
    files = [folder / name for name in FIGURES]
    write_html(files[0], front)
    write_png(files[1], front)
    shares = importances(front.drawn)
    write_insights_html(files[2], front, shares)
    write_insights_png(files[3], front, shares)
    return files
