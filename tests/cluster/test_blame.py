"""Whose fault an exception is: one rule, over real exceptions of each kind."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vgid.cluster.losses import blame, where
from vgid.cluster.mailbox import Job
from vgid.errors import DiskError, InputError, SettingError
from vgid.files import write_atomically
from vgid.models.store import ContentStore


def job(kind="trial", attempt=1):
    return Job(id="0000", kind=kind, attempt=attempt)


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def throw(error):
    def call():
        raise error

    return call


def to_a_full_disk():
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")


def into_no_folder():
    save_file({"x": np.zeros(2)}, "/nowhere/x.safetensors")


def more_than_there_is():
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call",
    [
        to_a_full_disk,
        into_no_folder,
        more_than_there_is,
        throw(MemoryError()),
        throw(ConnectionResetError()),
        throw(ray.exceptions.ActorDiedError()),
        throw(torch.distributed.DistNetworkError("a peer is gone")),
        throw(torch.AcceleratorError("unspecified launch failure")),
        throw(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")),
    ],
)
@pytest.mark.parametrize("kind", ["trial", "base", "rescore"])
def test_what_the_environment_does_is_lost_and_not_failed(call, kind):
    outcome = blame(job(kind), raised(call), has_session=True)
    assert (outcome.lost, outcome.fatal, outcome.result) == (True, False, None)
    assert outcome.error


@pytest.mark.parametrize(
    "error", [ValueError("Fay Moss"), KeyError("x"), RuntimeError("shapes"), ZeroDivisionError()]
)
def test_what_the_trials_own_code_raises_is_its_own_failure_and_stays_private(error):
    outcome = blame(job(), raised(throw(error)), has_session=True)
    assert (outcome.lost, outcome.fatal) == (False, False)
    assert outcome.result.status == "failed"
    assert outcome.error.startswith(f"{type(error).__name__} at test_blame.py:")
    assert "Fay" not in outcome.error


def test_an_accelerator_may_run_out_of_memory_once():
    error = raised(throw(torch.OutOfMemoryError("tried to allocate 2 GiB")))
    assert blame(job(attempt=1), error, has_session=True).lost
    again = blame(job(attempt=2), error, has_session=True)
    assert not again.lost
    assert again.result.status == "failed"


@pytest.mark.parametrize(
    ("kind", "error", "has_session", "fatal"),
    [
        ("trial", InputError("the data is gone."), True, True),
        ("base", InputError("the data is gone."), True, True),
        ("rescore", InputError("no weights."), False, True),
        ("rescore", InputError("the adapter is gone."), True, False),
        ("trial", SettingError("rmu_layer: lower it."), True, False),
    ],
)
def test_bad_input_is_fatal_if_all_jobs_share_it(kind, error, has_session, fatal):
    outcome = blame(job(kind), raised(throw(error)), has_session)
    assert (outcome.error, outcome.fatal, outcome.lost) == (str(error), fatal, False)


@pytest.mark.parametrize("as_safetensors", [False, True])
def test_a_full_disk_is_named_with_its_folder_and_the_remedy(tmp_path, as_safetensors):
    error = raised(to_a_full_disk)
    if as_safetensors:  # which has no class of its own for it
        error = SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})")
    outcome = blame(job(), error, True, [tmp_path, tmp_path / "not there"])
    # Which disk has least left is the machine's; the temporary folder is one of those asked.
    assert outcome.error.endswith(": its disk is full; free some space.")
    assert Path(outcome.error.split(":")[0]).is_dir()


def test_files_that_cannot_be_written_are_the_disks_fault(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (
        lambda: write_atomically(tmp_path / "file" / "x", b""),
        lambda: ContentStore(tmp_path / "file", "teachers"),
    ):
        error = raised(call)
        assert isinstance(error, DiskError)
        outcome = blame(job("base"), error, has_session=True)
        assert (outcome.lost, outcome.error) == (True, str(error))


def test_an_exception_is_named_by_kind_and_place_never_by_its_message():
    named = where(raised(throw(ValueError("Ada Lovelace was born in London"))))
    assert named.startswith("ValueError at test_blame.py:")
    assert "Ada" not in named
