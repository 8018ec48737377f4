"""A web page around a picture, drawn with plotly, that needs no network.

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

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
html, body {{ height: 100%; margin: 0; background: white; }}
body {{ display: flex; flex-direction: column; font: 13px system-ui, sans-serif; color: #333; }}
.picture {{ flex: 1 0 auto; height: 0; min-height: 360px; }}
{style}
</style>
<div id="{name}" class="picture"></div>
{body}
<script id="payload" type="application/json">{payload}</script>
{library}
<script>
function draw(payload) {{
  const plot = document.getElementById("{name}");
  const options = {{ responsive: true, displaylogo: false }};
  Plotly.newPlot(plot, payload.data, payload.layout, options).then(() => {{
{script}
  }});
}}
loaded.then(() => draw(JSON.parse(document.getElementById("payload").textContent)))
  .catch((error) => {{
    document.body.textContent =
      `A browser of 2023 or later is needed (${{error}}); the PNG beside it shows the same.`;
  }});
</script>
</html>
"""

_INSIDE = """<script id="library" type="text/plain">{library}</script>
<script>
const code = atob(document.getElementById("library").textContent);
const packed = new Blob([Uint8Array.from(code, (c) => c.charCodeAt(0))]);
const unpacked = packed.stream().pipeThrough(new DecompressionStream("gzip"));
const loaded = new Response(unpacked).text().then((text) => {{
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
}});
</script>"""

_BESIDE = '<script src="plotly.min.js"></script><script>const loaded = Promise.resolve();</script>'


def write_page(
    path: Path,
    picture: Picture,
    payload: Mapping[str, Any] | None = None,
    *,
    style: str = "",
    body: str = "",
    script: str = "",
    beside: bool = False,
) -> None:
    """Write one page that needs nothing from elsewhere.

    Args:
        path: the file; its stem is the id of the picture's element, of class ``picture``.
        picture: what to draw.
        payload: further plain data for ``script``.
        style: CSS.
        body: HTML below the picture, in which what comes from a user is escaped.
        script: JavaScript that runs once it is drawn, with the element ``plot`` and ``payload``
            (plotly's ``data`` and ``layout`` among it) at hand.
        beside: plotly's code lies beside the page as ``plotly.min.js``, put there if it is not,
            instead of inside it.

    Raises:
        InputError: a file cannot be written.
    """
    if beside and not (path.parent / "plotly.min.js").exists():
        write_atomically(path.parent / "plotly.min.js", _plotly().encode())
    # "<" cannot stand in a script element's JSON as it is: "</script>" would end it.
    data = json.dumps({**picture.plotly(), **(payload or {})}, ensure_ascii=False)
    page = _PAGE.format(
        title=escape(picture.title),
        name=path.stem,
        style=style,
        body=body,
        payload=data.replace("<", "\\u003c"),
        library=_BESIDE if beside else _INSIDE.format(library=_packed()),
        script=script,
    )
    write_atomically(path, page.encode())


@cache  # a second, and pages come in twos
def _packed() -> str:
    return base64.b64encode(gzip.compress(_plotly().encode(), 9, mtime=0)).decode()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
