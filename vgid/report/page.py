"""A web page around pictures, drawn with plotly, that needs no network.

plotly's JavaScript is kept compressed inside the page (a third of its size) and unpacked by the
browser, or lies once beside many pages. The pages also have to work in MLflow's artifact viewer,
which shows them in a frame that may run scripts and nothing else: no window of its own, no
storage, no request to the server.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from vgid.files import write_atomically
from vgid.report.drawing import Picture


def rendered(room: str, file: str, /, **values: Any) -> str:
    """A text file of a room, such as ``vgid.report``, with values put in its places."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(room, ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(file).render(values)


def write_picture(
    folder: Path, stem: str, picture: Picture, body: str = "", **page: Any
) -> list[str]:
    """Write ``<stem>.png`` and, with the picture above a body, ``<stem>.html``; both names."""
    write_atomically(folder / f"{stem}.png", picture.png())
    body = f'<div id="{stem}" class="picture"></div>\n{body}'
    write_page(folder / f"{stem}.html", picture.title, {stem: picture}, body=body, **page)
    return [f"{stem}.png", f"{stem}.html"]


def write_page(
    path: Path,
    title: str,
    pictures: Mapping[str, Picture],
    payload: Mapping[str, Any] | None = None,
    *,
    body: str,
    style: str = "",
    script: str = "",
    beside: bool = False,
) -> None:
    """Write one page that needs nothing from elsewhere.

    ``body`` is HTML (what comes from a user is escaped in it) with an element of the class
    ``picture`` for each of the ``pictures``, by id; ``style`` is CSS, ``script`` JavaScript that
    runs once they are drawn, with ``payload`` at hand. ``beside``: plotly's code lies beside the
    page as ``plotly.min.js``, put there if it is not, instead of inside it.
    """
    if beside and not (path.parent / "plotly.min.js").exists():
        write_atomically(path.parent / "plotly.min.js", _plotly().encode())
    drawn = {"pictures": {name: picture.plotly() for name, picture in pictures.items()}}
    # "<" cannot stand in a script element's JSON as it is: "</script>" would end it.
    data = json.dumps({**drawn, **(payload or {})}, ensure_ascii=False, separators=(",", ":"))
    page = rendered(
        "vgid.report",
        "page.html.jinja",
        title=escape(title),
        style=style,
        body=body,
        payload=data.replace("<", "\\u003c"),
        packed="" if beside else _packed(),
        script=script,
    )
    write_atomically(path, page.encode())


@cache  # a second, and pages come in twos
def _packed() -> str:
    return base64.b64encode(gzip.compress(_plotly().encode(), 9, mtime=0)).decode()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
