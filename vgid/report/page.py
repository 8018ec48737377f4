"""A web page that draws with plotly and needs no network.

plotly's JavaScript is kept compressed inside the page (a third of its size) and unpacked by the
browser. The pages also have to work in MLflow's artifact viewer, which shows them in a frame that
may run scripts and nothing else: no window of its own, no storage, no request to the server.
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

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
html, body {{ height: 100%; margin: 0; background: white; }}
body {{ display: flex; flex-direction: column; font: 13px system-ui, sans-serif; color: #333; }}
{style}
</style>
{body}
<script id="payload" type="application/json">{payload}</script>
<script id="library" type="text/plain">{library}</script>
<script>
const text = (id) => document.getElementById(id).textContent;
const packed = Uint8Array.from(atob(text("library")), (c) => c.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const options = {{ responsive: true, displaylogo: false }};
function draw(payload) {{
{script}
}}
new Response(unpacked).text().then((code) => {{
  const script = document.createElement("script");
  script.textContent = code;
  document.head.append(script);
  draw(JSON.parse(text("payload")));
}}).catch((error) => {{
  document.body.textContent =
    `This picture needs a browser of 2023 or later (${{error}}); the PNG beside it shows the same.`;
}});
</script>
</html>
"""


def write_page(
    path: Path, title: str, payload: Mapping[str, Any], *, style: str, body: str, script: str
) -> None:
    """Write one self-contained page.

    Args:
        path: the file.
        title: of the browser's window.
        payload: plain data, given to ``script`` as ``payload``.
        style: CSS.
        body: HTML before the scripts; nothing in it comes from a user.
        script: JavaScript that draws, with ``Plotly``, ``payload`` and plotly's ``options`` at
            hand.

    Raises:
        InputError: the file cannot be written.
    """
    # "<" cannot stand in a script element's JSON as it is: "</script>" would end it.
    data = json.dumps(payload, ensure_ascii=False).replace("<", "\\u003c")
    page = _PAGE.format(
        title=escape(title), style=style, body=body, payload=data, library=_library(), script=script
    )
    write_atomically(path, page.encode())


@cache  # a second, and pages come in twos
def _library() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
