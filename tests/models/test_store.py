"""The content store, with real processes, files and signals."""

import hashlib
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import vgid.models.store as content_store
from tests.workers import CONTEXT
from vgid.errors import InputError
from vgid.models.store import ContentStore, info, key_of

HEADER_BYTES = 72
"""Of a file with one float32 vector ``x`` of 100 to 999 bytes: 8 for the length, 64 of JSON."""


def vector(n: int, value: float = 0.0) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.full((n,), value)}


def never() -> dict[str, Tensor]:
    raise AssertionError("computed, but the entry was there")


def names(root: Path) -> set[str]:
    """All files below ``root``, but for the marker."""
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return found - {"store.json"}


def entry(kind: str, described: Any) -> str:
    return f"{kind}/{key_of(described)}.safetensors"


def spawn(target: Callable[..., None], *args: object) -> Any:
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def ended(process: Any) -> int | None:
    process.join(120)
    return process.exitcode


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


# Keys and values


def test_key_is_the_hash_of_canonical_json():
    text = '{"a":[1,2.5,null],"b":"\\u00e9"}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert key_of({"b": "é", "a": (1, 2.5, None)}) == expected
    assert key_of({"a": [1, 2.5, None], "b": "é"}) == expected
    assert len({key_of(x) for x in ([1], [1.0], ["1"], [[1]], [True], [None])}) == 6


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_key_refuses_numbers_that_differ_between_writers(number: float):
    with pytest.raises(ValueError, match="JSON"):
        key_of([number])


def test_key_refuses_what_json_does_not_have():
    with pytest.raises(TypeError):
        key_of({"folder": Path("x")})


def test_an_entry_is_computed_once_and_read_bit_for_bit(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    values = {
        "f32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(4, 2, generator=generator).to(torch.bfloat16),
        "turned": torch.randn(4, 6, generator=generator).T,
        "ids": torch.tensor([2**40, -1]),
        "none": torch.empty(0, 7),
        "scalar": torch.tensor(float("nan")),
    }
    store = ContentStore(tmp_path / "store", "teachers")
    cold = store.get_or_compute(key_of("a"), lambda: values)
    warm = store.get_or_compute(key_of("a"), never)
    for read in (cold, warm, load_file(tmp_path / "store" / entry("teachers", "a"))):
        assert read.keys() == values.keys()
        for name, value in values.items():
            assert read[name].dtype == value.dtype
            assert read[name].is_contiguous()
            assert torch.equal(read[name].isnan(), value.isnan())
            assert torch.equal(read[name].nan_to_num(), value.nan_to_num())
    assert (store.hits, store.misses) == (1, 1)
    assert names(tmp_path / "store") == {entry("teachers", "a")}  # no lock is left


def test_what_is_read_can_be_changed_without_changing_the_store(tmp_path: Path):
    store = ContentStore(tmp_path, "teachers")
    store.get_or_compute(key_of(0), vector(4))
    store.get_or_compute(key_of(0), never)["x"].add_(1)
    assert store.get_or_compute(key_of(0), never)["x"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("key", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_hashes_are_keys(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match="no key"):
        ContentStore(tmp_path, "teachers").get_or_compute(key, vector(1))


def test_a_failing_computation_leaves_nothing(tmp_path: Path):
    store = ContentStore(tmp_path, "teachers")
    with pytest.raises(ZeroDivisionError):
        store.get_or_compute(key_of(0), lambda: {"x": torch.tensor(1 // 0)})
    assert names(tmp_path) == set()
    assert store.get_or_compute(key_of(0), vector(1, 2.0))["x"].tolist() == [2.0]
    assert (store.hits, store.misses) == (0, 1)


def test_a_computation_may_use_another_kind_of_the_store(tmp_path: Path):
    vision = ContentStore(tmp_path, "vision", 10_000)
    teachers = ContentStore(tmp_path, "teachers", 10_000)
    read = teachers.get_or_compute(
        key_of("t"), lambda: {"y": vision.get_or_compute(key_of("v"), vector(3, 2.0))["x"] * 2}
    )
    assert read["y"].tolist() == [4.0, 4.0, 4.0]
    assert names(tmp_path) == {entry("vision", "v"), entry("teachers", "t")}


# Faults


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_file_is_computed_again_and_replaced(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        store = ContentStore(Path(folder), "teachers")
        store.get_or_compute(key_of(0), vector(20, 3.0))
        path = Path(folder) / entry("teachers", 0)
        whole = path.read_bytes()
        keep = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:keep] + data.draw(st.sampled_from([b"", b"\0" * 9000])))
        assert store.get_or_compute(key_of(0), vector(20, 3.0))["x"].tolist() == [3.0] * 20
        assert path.read_bytes() == whole
        assert (store.hits, store.misses) == (0, 2)


def _without_room(root: Path, report: Path) -> None:
    store = ContentStore(root, "teachers")
    store.get_or_compute(key_of("small"), vector(1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        store.get_or_compute(key_of("large"), vector(10_000))
    except InputError as error:
        report.write_text(str(error))
    store.get_or_compute(key_of("small"), never)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path):
    root, report = tmp_path / "store", tmp_path / "report"
    assert ended(spawn(_without_room, root, report)) == 0
    message = report.read_text()
    assert message.startswith(f"{root / 'teachers'}: the store cannot be written (File too large)")
    assert "free some space" in message and "bound" in message
    assert message.count(".") == message.count("\n") + 1 == 1
    assert names(root) == {entry("teachers", "small")}


def _as_reader(root: Path, report: Path) -> None:
    report.touch()
    report.chmod(0o666)
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    lines = []
    store = ContentStore(root, "teachers", 123)
    lines.append(str(store.get_or_compute(key_of("there"), never)["x"].tolist()))
    try:
        store.get_or_compute(key_of("missing"), vector(1))
    except InputError as error:
        lines.append(str(error))
    report.write_text("\n".join([*lines, str((store.hits, store.misses))]))


def test_a_store_that_can_only_be_read_serves_hits():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # another user passes through
        root, report = Path(folder) / "store", Path(folder) / "report"
        ContentStore(root, "teachers").get_or_compute(key_of("there"), vector(2, 5.0))
        for path in (root / "teachers", root):
            path.chmod(0o555)
        assert ended(spawn(_as_reader, root, report)) == 0
        for path in (root, root / "teachers"):
            path.chmod(0o755)
        hit, refused, counts = report.read_text().splitlines()
        assert (hit, counts) == ("[5.0, 5.0]", "(1, 0)")
        assert refused.startswith(f"{root / 'teachers'}: the store cannot be written (Permission")
        assert names(root) == {entry("teachers", "there")}


def test_a_file_in_the_place_of_the_folder(tmp_path: Path):
    (tmp_path / "store").write_text("")
    with pytest.raises(InputError, match=r"store.*cannot be written .*choose another folder\.$"):
        ContentStore(tmp_path / "store", "teachers")


# Processes


def _compute_slowly(root: Path, name: str) -> None:
    def compute() -> dict[str, Tensor]:
        (root / f"computes-{name}").touch()
        until((root / "go").exists)
        return {"x": torch.arange(1000)}

    (root / f"ready-{name}").touch()
    until(lambda: len(list(root.glob("ready-*"))) == 2)
    store = ContentStore(root / "store", "teachers", 10**6)
    read = store.get_or_compute(key_of("shared"), compute)["x"]
    (root / f"counts-{name}").write_text(f"{store.hits} {store.misses} {int(read.sum())}")


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path: Path):
    processes = [spawn(_compute_slowly, tmp_path, name) for name in "ab"]
    until(lambda: any(tmp_path.glob("computes-*")))
    time.sleep(0.5)  # time for the other to compute too, if nothing kept it from that
    assert len(list(tmp_path.glob("computes-*"))) == 1
    (tmp_path / "go").touch()
    assert [ended(process) for process in processes] == [0, 0]
    counts = {path.read_text() for path in tmp_path.glob("counts-*")}
    assert counts == {"0 1 499500", "1 0 499500"}
    assert names(tmp_path / "store") == {entry("teachers", "shared")}


def _hold_the_lock(root: Path) -> None:
    def compute() -> dict[str, Tensor]:
        (root / "computes").touch()
        time.sleep(600)
        return {}

    ContentStore(root / "store", "teachers").get_or_compute(key_of(0), compute)


def test_a_process_killed_while_it_computes_frees_the_entry(tmp_path: Path):
    process = spawn(_hold_the_lock, tmp_path)
    until((tmp_path / "computes").exists)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    store = ContentStore(tmp_path / "store", "teachers")
    assert store.get_or_compute(key_of(0), vector(1, 7.0))["x"].tolist() == [7.0]
    assert names(tmp_path / "store") == {entry("teachers", 0)}


def _die_before_the_rename(root: Path) -> None:
    def die(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store = ContentStore(root, "teachers")
    content_store._use = die  # type: ignore[assignment]
    store.get_or_compute(key_of(0), vector(5000))


def test_a_process_killed_while_it_writes_leaves_no_torn_entry(tmp_path: Path):
    process = spawn(_die_before_the_rename, tmp_path)
    assert ended(process) == -signal.SIGKILL
    (torn,) = (tmp_path / "teachers").glob("*.tmp")
    assert torn.name.startswith(f"{key_of(0)}.{process.pid}.")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert info(tmp_path).entries == 0

    store = ContentStore(tmp_path, "teachers", 10**6)
    assert store.get_or_compute(key_of(0), vector(2, 1.0))["x"].tolist() == [1.0, 1.0]
    assert torn.exists()  # it may be a writer's of another node, until it is old
    alive = torn.with_name(f"{key_of(1)}.{os.getpid()}.0badcafe.tmp")
    alive.write_bytes(b"half")
    long_ago = time.time() - 3700
    for path in (torn, alive):
        os.utime(path, (long_ago, long_ago))
    with FileLock(alive.with_name(f"{key_of(1)}.lock")):  # as its writer holds it
        store.get_or_compute(key_of(2), vector(2))
        assert names(tmp_path) == {
            entry("teachers", 0),
            entry("teachers", 2),
            f"teachers/{alive.name}",
            f"teachers/{key_of(1)}.lock",
        }


def _read_and_evict(root: Path, seed: int, kind: str) -> None:
    draw = random.Random(seed)
    store = ContentStore(root, kind, limit_bytes=5 * (HEADER_BYTES + 400))
    for _ in range(80):
        n = draw.randrange(12)
        read = store.get_or_compute(key_of(n), vector(100, float(n)))
        assert read["x"].tolist() == [float(n)] * 100
    assert store.hits and store.misses and store.hits + store.misses == 80


def test_processes_read_while_others_evict(tmp_path: Path):
    jobs = [(0, "vision"), (1, "vision"), (2, "teachers")]
    processes = [spawn(_read_and_evict, tmp_path, seed, kind) for seed, kind in jobs]
    assert [ended(process) for process in processes] == [0, 0, 0]
    left = names(tmp_path)
    assert all(name.endswith(".safetensors") for name in left)
    assert info(tmp_path).bytes == len(left) * (HEADER_BYTES + 400)
    assert 1 <= len(left) <= 5
