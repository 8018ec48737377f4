"""What a content store holds: its bound, what ``info`` counts and ``clear`` removes."""

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.test_store import HEADER_BYTES, entry, names, never, vector
from vgid.errors import InputError
from vgid.models.store import ContentStore, clear, find_root, info, key_of

# The bound


def test_least_recently_used_goes_first_and_a_hit_counts_as_use(tmp_path: Path):
    limit = 3 * (HEADER_BYTES + 400)
    vision = ContentStore(tmp_path, "vision", limit)
    teachers = ContentStore(tmp_path, "teachers", limit)
    vision.get_or_compute(key_of("a"), vector(100))
    teachers.get_or_compute(key_of("b"), vector(100))
    vision.get_or_compute(key_of("c"), vector(100))
    vision.get_or_compute(key_of("a"), never)
    teachers.get_or_compute(key_of("d"), vector(100))
    assert names(tmp_path) == {entry("vision", "a"), entry("vision", "c"), entry("teachers", "d")}
    teachers.get_or_compute(key_of("e"), vector(200))
    assert names(tmp_path) == {entry("teachers", "d"), entry("teachers", "e")}


def test_an_entry_larger_than_the_bound_stays_until_the_next_write(tmp_path: Path):
    store = ContentStore(tmp_path, "vision", 1000)
    store.get_or_compute(key_of("small"), vector(100))
    store.get_or_compute(key_of("huge"), vector(900))
    assert names(tmp_path) == {entry("vision", "huge")}
    store.get_or_compute(key_of("huge"), never)
    store.get_or_compute(key_of("small"), vector(100))
    assert names(tmp_path) == {entry("vision", "small")}


def test_a_lowered_bound_takes_effect_at_once_and_an_equal_one_does_not_scan(tmp_path: Path):
    store = ContentStore(tmp_path, "vision")
    for n in range(4):
        store.get_or_compute(key_of(n), vector(100))
    ContentStore(tmp_path, "teachers", 1000)
    kept = {entry("vision", 2), entry("vision", 3)}
    assert names(tmp_path) == kept
    store.get_or_compute(key_of(4), vector(100))  # knows of no bound
    ContentStore(tmp_path, "teachers", 1000)
    assert names(tmp_path) == kept | {entry("vision", 4)}


Access = tuple[str, int]
ACCESSES = st.lists(st.tuples(st.sampled_from(["teachers", "vision"]), st.integers(0, 5)))


@settings(max_examples=40, deadline=None)
@given(ACCESSES, st.one_of(st.none(), st.integers(0, 2500)))
def test_evicts_like_the_plainest_model_of_least_recently_used(
    accesses: list[Access], limit: int | None
):
    twin: list[Access] = []  # least recently used first

    def size(access: Access) -> int:
        return HEADER_BYTES + 4 * (50 + 30 * access[1])

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = {kind: ContentStore(root, kind, limit) for kind in ("teachers", "vision")}
        hits = 0
        for access in accesses:
            kind, n = access
            stores[kind].get_or_compute(key_of(n), vector(50 + 30 * n, float(n)))
            if access in twin:
                hits += 1
                twin.remove(access)
                twin.append(access)
            else:
                twin.append(access)
                while limit is not None and len(twin) > 1 and sum(map(size, twin)) > limit:
                    twin.pop(0)
            assert names(root) == {entry(*held) for held in twin}
        assert sum(store.hits for store in stores.values()) == hits
        found = info(root)
        assert (found.entries, found.bytes) == (len(twin), sum(map(size, twin)))
        assert found.limit_bytes == limit


# Looking and clearing


def strangers(root: Path) -> set[str]:
    """Files in a store's root that are not the store's."""
    held = {
        f"base-{key_of('scores')}.json": "{}",
        f"base-{key_of('scores')}.lock": "",
        f"base-{key_of('scores')}.1.tmp": "",
        f"{key_of('no kind')}.safetensors": "",
        "teachers/notes.txt": "mine",
        "weights/model.safetensors": "weights",
        "weights/deeper/0.lock": "",
    }
    for name, text in held.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return set(held)


def test_other_files_of_the_root_are_neither_counted_nor_touched(tmp_path: Path):
    store = ContentStore(tmp_path, "teachers", 0)
    others = strangers(tmp_path)
    for n in range(3):
        store.get_or_compute(key_of(n), vector(100))
    assert names(tmp_path) == others | {entry("teachers", 2)}
    assert (info(tmp_path).entries, info(tmp_path).bytes) == (1, HEADER_BYTES + 400)
    assert clear(tmp_path).entries == 1
    assert names(tmp_path) == others
    assert (tmp_path / "weights" / "model.safetensors").read_text() == "weights"


def test_info_counts_by_kind_and_knows_the_bound_and_the_last_use(tmp_path: Path):
    before = datetime.now(UTC).replace(microsecond=0)
    vision, teachers = (ContentStore(tmp_path, kind, 10**6) for kind in ("vision", "teachers"))
    for n in range(3):
        vision.get_or_compute(key_of(n), vector(100))
    os.utime(tmp_path / entry("vision", 1), (1e9, 1e9))
    found = info(tmp_path)
    assert (found.root, found.limit_bytes) == (tmp_path, 10**6)
    assert (found.entries, found.bytes) == (3, 3 * (HEADER_BYTES + 400))
    assert list(found.by_kind) == ["teachers", "vision"]
    assert found.by_kind["teachers"].model_dump() == {
        "entries": 0,
        "bytes": 0,
        "oldest_use": None,
        "newest_use": None,
    }
    assert found.by_kind["vision"].bytes == found.bytes
    assert found.oldest_use == "2001-09-09T01:46:40.000+00:00"
    assert before <= datetime.fromisoformat(str(found.newest_use)) <= datetime.now(UTC)
    teachers.get_or_compute(key_of(0), vector(100))
    assert info(tmp_path).by_kind["teachers"].entries == 1


def test_clear_tells_what_was_removed_of_each_kind(tmp_path: Path):
    for kind, count in (("vision", 2), ("teachers", 3)):
        store = ContentStore(tmp_path, kind)
        for n in range(count):
            store.get_or_compute(key_of(n), vector(100))
    removed = clear(tmp_path)
    assert (removed.entries, removed.bytes) == (5, 5 * (HEADER_BYTES + 400))
    assert {kind: held.entries for kind, held in removed.by_kind.items()} == {
        "teachers": 3,
        "vision": 2,
    }
    assert names(tmp_path) == set()
    store.get_or_compute(key_of(0), vector(100))
    assert info(tmp_path).entries == 1


def test_clear_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path):
    ContentStore(tmp_path, "vision")
    folder = tmp_path / "vision"
    dead, living = key_of("dead"), key_of("living")
    for key in (dead, living):
        (folder / f"{key}.lock").touch()
        (folder / f"{key}.4000000.00ff.tmp").write_bytes(b"half")
    (folder / f"{key_of('lockless')}.4000000.00ff.tmp").write_bytes(b"half")
    (folder / f"{key_of('torn')}.safetensors").touch()
    with FileLock(folder / f"{living}.lock"):
        assert clear(tmp_path).entries == 1
    assert names(tmp_path) == {f"vision/{living}.lock", f"vision/{living}.4000000.00ff.tmp"}
    clear(tmp_path)
    assert names(tmp_path) == set()


def test_a_study_folder_leads_to_its_store(tmp_path: Path):
    ContentStore(tmp_path / "study" / "store", "vision")
    assert find_root(tmp_path / "study") == find_root(tmp_path / "study" / "store")
    for folder, what in ((tmp_path, "holds no store"), (tmp_path / "nowhere", "no such folder")):
        for look in (find_root, info, clear):
            with pytest.raises(InputError, match=f"^{folder}: .*{what}"):
                look(folder)


def test_a_damaged_marker_is_no_bound_and_is_written_again(tmp_path: Path):
    ContentStore(tmp_path, "vision", 5)
    (tmp_path / "store.json").write_bytes(b"\xff{")
    assert info(tmp_path).limit_bytes is None
    ContentStore(tmp_path, "vision", 5)
    assert json.loads((tmp_path / "store.json").read_text()) == {"limit_bytes": 5}
