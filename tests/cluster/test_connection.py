"""cluster.yaml: valid for Ray's launcher, of one version with the project, closed to the world.

And what joins a cluster or starts one.
"""

import copy
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vgid.cluster.connection import ALONE, QUIET, connected

ROOT = Path(__file__).parents[2]
RAW = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(scope="module")
def cluster():
    """The configuration as the launcher sees it, with its own defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(RAW))
    validate_config(config)
    return config


def start_arguments(commands):
    (command,) = [line for line in commands if "ray start" in line]
    return shlex.split(command)


def every_text(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from every_text(key)
            yield from every_text(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from every_text(inner)
    else:
        yield str(value)


def test_a_mistake_would_be_noticed():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(yaml.safe_load(RAW)))
    config["docker"]["imgae"] = "x"
    with pytest.raises(Exception, match="imgae"):
        validate_config(config)


def test_images_have_the_ray_version_of_the_constraints(cluster):
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    docker = cluster["docker"]
    assert docker["image"] == f"rayproject/ray:{version}-py311-cpu"
    assert docker["worker_image"] == f"rayproject/ray:{version}-py311-gpu"


def test_head_is_a_cpu_node_and_gpu_nodes_scale_from_none(cluster):
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head"
    assert types["head"]["max_workers"] == 0
    assert types["head"]["node_config"]["InstanceType"].startswith("m")
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 4)
    assert types["gpu"]["node_config"]["InstanceType"].startswith("g")


def test_the_dashboard_listens_on_loopback_only(cluster):
    assert "--dashboard-host=127.0.0.1" in start_arguments(cluster["head_start_ray_commands"])
    hosts = re.findall(r"--dashboard-host[= ](\S+)", " ".join(every_text(cluster)))
    assert set(hosts) == {"127.0.0.1"}


def test_every_process_asks_for_the_token(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    for part in ("head", "worker"):
        assert "RAY_AUTH_MODE=token;" in start_arguments(cluster[f"{part}_start_ray_commands"])
        assert not cluster["docker"].get(f"{part}_run_options")
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in RAW  # the secret itself never stands here


def test_no_port_is_open_to_the_world(cluster):
    for text in every_text(cluster):
        assert "0.0.0.0" not in text
        assert "::/0" not in text
    assert cluster["provider"]["use_internal_ips"] is True
    assert cluster["auth"]["ssh_proxy_use_node_id"] is True


def test_ray_makes_no_security_group_of_its_own(cluster):
    """One that Ray makes admits SSH from everywhere; it makes none if every node type names one."""
    assert "security_group" not in cluster["provider"]
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]


def test_studies_lie_on_storage_that_every_node_mounts(cluster):
    (mount,) = [line for line in cluster["initialization_commands"] if "mount -t nfs4" in line]
    folder = mount.split()[-1]
    assert f"--volume {folder}:{folder}" in cluster["docker"]["run_options"]
    assert f"--output {folder}/" in RAW


def test_what_is_copied_exists_and_is_what_an_installation_needs(cluster):
    for target, source in cluster["file_mounts"].items():
        if target.startswith("/home/ray/project/"):
            assert (ROOT / source).exists(), source
    needed = {"vgid", "studies", "search_spaces", "pyproject.toml", "constraints.txt", "README.md"}
    assert {f"/home/ray/project/{name}" for name in needed} <= set(cluster["file_mounts"])
    assert any("--editable ~/project" in line for line in cluster["setup_commands"])


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
