"""A node without the study's folder joins while trials run; run by ``late_node.py``.

``python -m tests.cluster.late FOLDER``, in the namespace of ``nodes.run_alone``.
"""

import json
import os
import signal
import sys
from pathlib import Path

from tests.cluster.nodes import Nodes
from tests.end_to_end.light import LightStudy

TRIALS = 500  # more than there is time for


def main(folder: Path) -> None:
    folder.mkdir()
    with Nodes() as nodes:
        ray = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        ray |= {"RAY_ADDRESS": nodes.address}
        with LightStudy(folder, TRIALS, "--max-concurrent", "2", **ray) as study:
            study.wait_for(study.ended)
            nodes.add(2, f"mount -t tmpfs none {folder}")
            study.wait_for(lambda: "A slot is not used" in study.shown())
            before = study.ended()
            study.wait_for(lambda: len(study.ended()) >= len(before) + 3)  # by the other slot
            study.signal(signal.SIGINT)
            code = study.finish()
    print(json.dumps({"code": code, "shown": study.shown()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
