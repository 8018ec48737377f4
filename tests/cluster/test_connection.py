"""What joins a cluster or starts one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vgid.cluster.connection import ALONE, QUIET, connected


@pytest.mark.parametrize(("before", "joins"), [(None, False), ("", False), ("127.0.0.1:1", True)])
def test_a_cluster_is_joined_where_an_address_names_one(monkeypatch, before, joins):
    asked = []

    def init(**settings):
        asked.append(settings.get("address"))
        return SimpleNamespace(address_info={"gcs_address": "127.0.0.1:1"})

    for name in (*QUIET, *ALONE, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # comes back as it was
        monkeypatch.delenv(name)
    if before is not None:
        monkeypatch.setenv("RAY_ADDRESS", before)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("vgid.cluster.connection.TOKEN", Path("/nowhere"))
    with connected() as joined:
        assert joined == joins
        assert os.environ["RAY_ADDRESS"] == (before or "127.0.0.1:1")
    assert asked == [None if joins else "local"]
    assert os.environ.get("RAY_ADDRESS") == (before or None)
