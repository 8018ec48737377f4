"""What a study costs beside its trials, by the trial: ``python -m tests.benchmarks.scale``.

- MLflow: requests that a study's own recorder makes of a server (SQLite behind it) in a trial
  without an adapter, and CPU seconds of the server.
- Slots: CPU, for each slot, of the processes that all slots share on the driver's
  node, while light trials of 20 s run: the difference between a study of 6 slots and one of 2.
- Store: what a trial of tiny-llava reads of the store and writes into it, beside its other files,
  in a study of three in one slot: read and written bytes of all of a worker's system calls.

For ``studies/README.md``, which says what a study on many GPUs needs.
"""

import argparse
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from tests.benchmarks.driver import Driver
from tests.benchmarks.machine import emit, machine, machine_line
from tests.end_to_end.head import ray_head
from tests.end_to_end.light import KINDS, LightStudy
from vgid.config import StudyConfig

LOOK_S = 40.0


def mlflow(trials: int, folder: Path) -> dict[str, float]:
    """Requests and seconds of a trial, as the study's own recorder tells it to a server."""
    import requests

    from tests.browser.servers import mlflow_server

    asked: Counter[str] = Counter()
    send = requests.Session.send

    def counted(session: Any, request: Any, **options: Any) -> Any:
        asked[f"{request.method} {request.path_url.split('?')[0].rpartition('/')[2][:20]}"] += 1
        return send(session, request, **options)

    with ExitStack() as stack:
        store = f"sqlite:///{folder / 'server.db'}"
        uri = stack.enter_context(mlflow_server(store, folder))
        config = StudyConfig(
            output=folder / "study", trials=trials + 1, sampler="random", tracking_uri=uri
        )
        driver = Driver(config, trials + 1)
        stack.callback(driver.close)
        driver.run(1)
        stack.enter_context(patch.object(requests.Session, "send", counted))
        server = psutil.Process().children(recursive=True)
        used = _cpu_s(server)
        driver.run(trials + 1)
        used = _cpu_s(server) - used
    return {
        "requests a trial": round(sum(asked.values()) / trials, 1),
        "CPU s of the server a trial": round(used / trials, 3),
    }


def slots(counts: tuple[int, int] = (2, 6)) -> dict[str, float]:
    """What one more slot costs the driver's node: CPU in cores."""
    found = [_of_slots(count) for count in counts]
    added = counts[1] - counts[0]
    return {name: round((found[1][name] - found[0][name]) / added, 4) for name in sorted(found[0])}


def _of_slots(count: int) -> dict[str, float]:
    kinds = ("driver", "slot host", "mailbox")
    with tempfile.TemporaryDirectory() as folder, ray_head(count, LIGHT_EPOCH_S="10") as head:
        flags = ("--max-concurrent", str(count))
        study = LightStudy(Path(folder), 1000, *flags, epochs=2, **head.joining)
        with study:
            study.wait_for(lambda: len(study.ended()) >= count)
            there = [psutil.Process(study.pid), head.process]
            family = [p for each in there for p in (each, *each.children(recursive=True))]
            shared = {"driver": [there[0]]}
            for kind in kinds[1:]:
                shared[kind] = [p for p in family if _title(p).startswith(KINDS[kind])]
            services = ("raylet", "gcs_server", "dashboard")
            shared["Ray's services"] = [p for p in family if _title(p).startswith(services)]
            before = {name: _cpu_s(processes) for name, processes in shared.items()}
            time.sleep(LOOK_S)
            used = {name: _cpu_s(shared[name]) - before[name] for name in shared}
            study.signal(signal.SIGTERM)
            study.finish()
    return {f"CPU of {name}, cores": value / LOOK_S for name, value in used.items()}


def _title(process: psutil.Process) -> str:
    try:
        line = process.cmdline() or [""]
    except psutil.Error:
        return ""
    return line[0] if line[0].startswith("ray::") else " ".join(Path(x).name for x in line[:4])


def _cpu_s(processes: Iterable[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def store(folder: Path) -> dict[str, float]:
    """MB that a worker reads and writes in a trial whose teacher the store holds, and in the first.

    Counted by the kernel (``rchar``, ``wchar``); what the store then holds stands beside.
    """
    from vgid.config import RequestConfig, TrialConfig
    from vgid.data.synthetic import write_benchmark
    from vgid.trial import TrialSession

    write_benchmark(folder / "data")
    request = RequestConfig(data=folder / "data", store=folder / "store")
    session = TrialSession(request)
    session.base_scores("search", 0)
    found: dict[str, float] = {}
    for number, name in enumerate(("first trial", "later trial")):
        before, held = _moved(), _size(folder / "store")
        session.run(TrialConfig(seed=number), f"{number:04d}", folder / "adapters" / str(number))
        after = _moved()
        found |= {f"{name}: {kind} MB": round(after[kind] - before[kind], 2) for kind in after}
        found[f"{name}: store grew by MB"] = round(_size(folder / "store") - held, 2)
    return found


def _moved() -> dict[str, float]:
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    values = dict(line.split(": ") for line in text.splitlines())
    return {"read": int(values["rchar"]) / 1e6, "written": int(values["wchar"]) / 1e6}


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def measure(trials: int) -> Mapping[str, Any]:
    """All three."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("mlflow", "store"):
            (root / name).mkdir()
        return {
            "mlflow": mlflow(trials, root / "mlflow"),
            "a slot": slots(),
            "store": store(root / "store"),
        }


def main() -> None:
    """Measure and print a table, with ``--json`` one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.trials)
    described = machine()
    print(machine_line(described), flush=True)
    emit({**found, "machine": described}, options.json)


if __name__ == "__main__":
    main()
