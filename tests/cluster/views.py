"""What nodes with other views of a study's folder say of it; run by ``test_shared.py``.

``python -m tests.cluster.views FOLDER``, in the namespace of ``nodes.run_alone``.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import ray

from tests.cluster.nodes import Nodes, wait_for
from tests.end_to_end.light import ROOT, space
from vgid.cluster.resources import SlotShape
from vgid.cluster.shared import Shared
from vgid.config import RequestConfig
from vgid.errors import InputError

MOUNTS = {
    2: "mount -t tmpfs none {0}",
    3: "mount -t tmpfs none {1} && mkdir {1}/up {1}/work && "
    "mount -t overlay -o lowerdir={0},upperdir={1}/up,workdir={1}/work none {0} && "
    "mount -t tmpfs none {0}/data",
}
"""A node that sees nothing, with one GPU; and one with a copy of its own, no data and two GPUs."""


def main(folder: Path) -> None:
    output, data, over = folder / "study", folder / "data" / "benchmark", folder.with_name("over")
    for made in (data, over):
        made.mkdir(parents=True)
    with Nodes() as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        for number, mount in MOUNTS.items():
            nodes.add(number, mount.format(folder, over), gpus=number - 1)
            wait_for(lambda count=number: len(ray.nodes()) == count, "a node does not join")
        found = look(output, data)
        ray.shutdown()
        study = [sys.executable, "-m", "tests.end_to_end.light", "--max-concurrent", "2"]
        study += ["--search-space", str(space(folder)), "--output", str(folder / "run")]
        study += ["--trials", "2"]
        environment = os.environ | {"RAY_ADDRESS": nodes.address}
        ran = subprocess.run(
            study, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    found["study"] = [ran.returncode, ran.stderr]
    print(json.dumps(found))


def look(output: Path, data: Path) -> dict[str, object]:
    """What each node says, and what a check says of nodes with so many GPUs."""
    request = RequestConfig(data=data, store=output / "store")
    shared = Shared.by(output / ".ray", request)
    ids = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}
    said = {}
    for address, node in ids.items():
        there = {"ray.io/node-id": node}
        asked = ray.remote(num_cpus=0, label_selector=there)(Shared.fault).remote(shared)
        said[address] = ray.get(asked, timeout=120)
    everywhere = output.parent.with_name("everywhere")
    seen = Shared.by(everywhere / ".ray", request.model_copy(update={"data": everywhere}))
    return {
        "ids": ids,
        "said": said,
        "copy": checked(dataclasses.replace(shared, reads=()), 2),
        "data": checked(shared, 2),
        "all": checked(seen, 0),
        "answered": sorted(path.name for path in seen.place.iterdir()),
    }


def checked(shared: Shared, gpus: int) -> str | None:
    """The sentence of a check of nodes with so many GPUs, if there is one."""
    try:
        shared.check(SlotShape(gpus_per_worker=gpus))
    except InputError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
