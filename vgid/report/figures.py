"""The figures of a study, each as a page and as a picture."""

from pathlib import Path

from vgid.files import write_atomically
from vgid.report.front import Front, write_html, write_png
from vgid.report.insights import importances, insights
from vgid.report.page import write_page

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
    picture = insights(front, importances(front.drawn))
    write_page(files[2], picture, style=".picture { min-height: 760px; }")
    write_atomically(files[3], picture.png())
    return files
