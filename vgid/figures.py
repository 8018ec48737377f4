"""The figures of a study, each as a page and as a picture."""

from pathlib import Path

from vgid.front_page import write_html
from vgid.insights import write_insights_html, write_insights_png
from vgid.plots import Front, write_png

_WRITERS = {
    "front.html": write_html,
    "front.png": write_png,
    "insights.html": write_insights_html,
    "insights.png": write_insights_png,
}
FIGURES = tuple(_WRITERS)


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
    for name, write in _WRITERS.items():
        write(folder / name, front)
    return [folder / name for name in FIGURES]
