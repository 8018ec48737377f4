"""cluster.yaml: valid for Ray's launcher, of one version with the project, closed to the world."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tests.benchmarks.architectures import TEXT_SIZES, random_backbone
from tests.benchmarks.profile import estimate
from tests.browser.programs import postgres_folder
from tests.cluster.kuberay import SCHEMA, example
from tests.end_to_end.conftest import free_port
from vgid.cluster.resources import RAY_BYTES, WORKER_BYTES
from vgid.study.search_space import FOLDER, SearchSpace

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


def mlflow_block(config):
    (block,) = [text for text in config["head_start_ray_commands"] if "mlflow server" in text]
    return block


def run_options(config):
    docker = config["docker"]
    return [
        text
        for name in ("run_options", "head_run_options", "worker_run_options")
        for text in docker.get(name, [])
    ]


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


def part(config, name, *keys):
    """What every node type has under a path of keys; None where it has not."""
    for node_type in config["available_node_types"].values():
        value = node_type["node_config"]
        for key in (name, *keys):
            value = value.get(key) if isinstance(value, dict) else None
        yield value


def the_dashboard_is_on_loopback(config):
    hosts = re.findall(r"--dashboard-host[= ](\S+)", " ".join(every_text(config)))
    return (
        set(hosts) == {"127.0.0.1"}
        and "--dashboard-host=127.0.0.1" in start_arguments(config["head_start_ray_commands"])
        and not re.search(r"--(publish|expose)|(^| )-[pP] ", " ".join(run_options(config)))
    )


def every_process_asks_for_the_token(config):
    parts = ("head", "worker")
    starts = [start_arguments(config[f"{part}_start_ray_commands"]) for part in parts]
    return (
        "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        and all("RAY_AUTH_MODE=token;" in start for start in starts)
        and set(re.findall(r"RAY_AUTH_MODE=([^\s;]+)", " ".join(every_text(config)))) == {"token"}
        and config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
        and not any("RAY_AUTH_TOKEN=" in text for text in every_text(config))
    )


def no_address_range_is_the_world(config):
    return not any(re.search(r"0\.0\.0\.0|(^|[\s='\"])::", text) for text in every_text(config))


def no_node_has_a_public_address(config):
    return config["provider"].get("use_internal_ips") is True and not any(
        "AssociatePublicIpAddress" in text for text in every_text(config)
    )


def ssh_needs_no_open_port(config):
    auth = config["auth"]
    return auth.get("ssh_proxy_use_node_id") is True and "aws ssm start-session" in auth.get(
        "ssh_proxy_command", ""
    )


def ray_makes_no_security_group(config):
    """One that Ray makes admits SSH from everywhere; it makes none if every node type names one."""
    return "security_group" not in config["provider"] and all(part(config, "SecurityGroupIds"))


def metadata_want_a_session(config):
    """So no request that a process was tricked into gets the instance's credentials."""
    options = list(part(config, "MetadataOptions"))
    return all(
        each
        and each.get("HttpTokens") == "required"
        and 1 <= each.get("HttpPutResponseHopLimit", 1) <= 2
        for each in options
    )


def workers_have_no_ec2_rights(config):
    names = list(config["available_node_types"])
    profiles = dict(zip(names, part(config, "IamInstanceProfile", "Arn"), strict=True))
    head, workers = profiles.pop(config["head_node_type"]), profiles.values()
    return all(worker and worker != head for worker in workers)


def disks_are_encrypted(config):
    return all(
        disks and all(disk["Ebs"].get("Encrypted") is True for disk in disks)
        for disks in part(config, "BlockDeviceMappings")
    )


def mlflow_answers_the_head_alone(config):
    block = mlflow_block(config)
    return (
        re.findall(r"--host[= ](\S+)", block) == ["127.0.0.1"]
        and re.findall(r"listen_addresses=(\S*)", block) == ["''\""]
        and "--allowed-hosts" not in block
        and "sudo install -d -m 700 -o 1000 -g 1000 /srv/mlflow" in " ".join(every_text(config))
    )


def changed(*path, to=None):
    """A change of a configuration: what stands at a path is removed, or is something else."""

    def change(config):
        *outer, last = path
        for key in outer:
            config = config[key]
        if to is None:
            del config[last]
        else:
            config[last] = to(config.get(last)) if callable(to) else to

    return change


def replaced(*path, old, new):
    """A change of a text, or of all texts of a list, in which ``old`` must stand."""

    def swap(value):
        texts = [value] if isinstance(value, str) else value
        assert any(old in text for text in texts)
        texts = [text.replace(old, new) for text in texts]
        return texts[0] if isinstance(value, str) else texts

    return changed(*path, to=swap)


GPU = ("available_node_types", "gpu", "node_config")
HEAD = ("available_node_types", "head", "node_config")
START, WORKER_START = "head_start_ray_commands", "worker_start_ray_commands"
WORLD = {"IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
OPENED = [
    (the_dashboard_is_on_loopback, replaced(START, old="host=127.0.0.1", new="host=0.0.0.0")),
    (the_dashboard_is_on_loopback, replaced(START, old="host=127.0.0.1", new="host 10.0.0.7")),
    (the_dashboard_is_on_loopback, replaced(START, old=" --dashboard-host=127.0.0.1", new="")),
    (the_dashboard_is_on_loopback, changed("docker", "head_run_options", to=["-p 8265:8265"])),
    (every_process_asks_for_the_token, replaced(START, old="RAY_AUTH_MODE=token;", new="")),
    (every_process_asks_for_the_token, replaced(WORKER_START, old="=token", new="=disabled")),
    (
        every_process_asks_for_the_token,
        replaced("docker", "run_options", old="--env RAY_AUTH_MODE=token", new="--init"),
    ),
    (
        every_process_asks_for_the_token,
        changed("docker", "worker_run_options", to=["--env RAY_AUTH_MODE=disabled"]),
    ),
    (
        every_process_asks_for_the_token,
        changed("docker", "head_run_options", to=["--env RAY_AUTH_TOKEN=0123456789"]),
    ),
    (no_address_range_is_the_world, changed("provider", "security_group", to=WORLD)),
    (no_address_range_is_the_world, changed("setup_commands", 0, to="nc -l :: 22")),
    (no_node_has_a_public_address, changed("provider", "use_internal_ips", to=False)),
    (no_node_has_a_public_address, changed("provider", "use_internal_ips")),
    (
        no_node_has_a_public_address,
        changed(*HEAD, "NetworkInterfaces", to=[{"AssociatePublicIpAddress": True}]),
    ),
    (ssh_needs_no_open_port, changed("auth", "ssh_proxy_command")),
    (ssh_needs_no_open_port, changed("auth", "ssh_proxy_use_node_id", to=False)),
    (ray_makes_no_security_group, changed("provider", "security_group", to={"GroupName": "x"})),
    (ray_makes_no_security_group, changed(*GPU, "SecurityGroupIds")),
    (ray_makes_no_security_group, changed(*HEAD, "SecurityGroupIds")),
    (metadata_want_a_session, changed(*GPU, "MetadataOptions")),
    (metadata_want_a_session, changed(*HEAD, "MetadataOptions", "HttpTokens", to="optional")),
    (
        metadata_want_a_session,
        changed(*GPU, "MetadataOptions", "HttpPutResponseHopLimit", to=64),
    ),
    (workers_have_no_ec2_rights, changed(*GPU, "IamInstanceProfile")),
    (
        workers_have_no_ec2_rights,
        replaced(*GPU, "IamInstanceProfile", "Arn", old="vgid-worker", new="vgid-head"),
    ),
    (disks_are_encrypted, changed(*GPU, "BlockDeviceMappings")),
    (disks_are_encrypted, changed(*HEAD, "BlockDeviceMappings", 0, "Ebs", "Encrypted", to=False)),
    (mlflow_answers_the_head_alone, replaced(START, old="--host 127.0.0.1", new="--host 0.0.0.0")),
    (mlflow_answers_the_head_alone, replaced(START, old=" --host 127.0.0.1", new="")),
    (mlflow_answers_the_head_alone, replaced(START, old="addresses=''", new="addresses='*'")),
    (mlflow_answers_the_head_alone, replaced("initialization_commands", old="700", new="755")),
]
RULES = list(dict.fromkeys(rule for rule, _ in OPENED))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_it_is_closed_to_the_world(cluster, rule):
    assert rule(cluster)


@pytest.mark.parametrize(
    ("rule", "change"), OPENED, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(OPENED)]
)
def test_a_change_that_opens_it_is_noticed(cluster, rule, change):
    opened = copy.deepcopy(json.loads(json.dumps(cluster)))  # so that the nodes share nothing
    change(opened)
    assert not rule(opened)


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


INSTANCES = {
    "g6e.2xlarge": {"GPU": "L40S", "GPU bytes": 45_776 * 2**20, "bytes": 64 * 2**30},
    "g5.2xlarge": {"GPU": "A10G", "GPU bytes": 22_888 * 2**20, "bytes": 32 * 2**30},
}
"""One GPU each, as `aws ec2 describe-instance-types` tells them."""
LEFT_FREE = 0.1
"""Of the GPU's memory: for temporaries, the allocator and CUDA, which the model does not count."""
RAYS_SHARE = 0.7
"""What Ray counts as a node's memory, the rest being its object store's."""


@pytest.fixture(scope="module")
def gpu_comment():
    """What stands above the GPU nodes' type."""
    return " ".join(re.search(r"  gpu:\n((    # .*\n)+)", RAW)[1].replace("    # ", "").split())


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_a_trial_fits_the_instances_that_are_named(cluster, gpu_comment, name):
    gpu_type = cluster["available_node_types"]["gpu"]
    chosen, cheaper = gpu_type["node_config"]["InstanceType"], "g5.2xlarge"
    assert f"One {INSTANCES[chosen]['GPU']} with 48 GB, enough for every backbone" in gpu_comment
    assert "g5.2xlarge, one A10G with 24 GB, is enough for the others" in gpu_comment
    fixed = SearchSpace.load(FOLDER / f"{name}.yaml", name).fixed
    together = fixed["questions_per_image"]
    rows = estimate(name, fixed["batch_size"] // together, together)
    taken = rows[fixed["gradient_checkpointing"]].peak_bytes
    host = WORKER_BYTES + RAY_BYTES + 2 * sum(p.numel() for p in parameters(name))
    instances = [chosen] if name == "llava-1.5-13b" else [chosen, cheaper]
    for instance in map(INSTANCES.get, instances):
        assert taken < (1 - LEFT_FREE) * instance["GPU bytes"]
        assert host < RAYS_SHARE * instance["bytes"]
    if name == "llava-1.5-13b":
        assert taken > INSTANCES[cheaper]["GPU bytes"]
        said = [
            int(gigabytes)
            for gigabytes in re.findall(r"take (\d+) GB.* and (\d+) w", gpu_comment)[0]
        ]
        assert said == [round(rows[layers].peak_bytes / 1e9) for layers in (True, False)]


def documented_job():
    return example((ROOT / "studies" / "README.md").read_text())


def defects(job):
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    return [error.message for error in validator.iter_errors(job)]


def test_the_documented_ray_job_is_what_kuberay_takes(cluster):
    job = documented_job()
    assert defects(job) == []
    spec = job["spec"]["rayClusterSpec"]
    assert f"rayproject/ray:{spec['rayVersion']}-py311-cpu" == cluster["docker"]["image"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["workerGroupSpecs"][0]["minReplicas"] == 0
    mounts = [
        mount["mountPath"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
    ]
    output, *flags = re.search(r"--output (\S+) (.*)", job["spec"]["entrypoint"]).groups()
    assert all(output.startswith(f"{mount}/") for mount in mounts) and len(mounts) == 2
    assert "--tracking-uri http://" in flags[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("spec", "entryPoint", to="python"), "'entryPoint' was unexpected"),
        (changed("spec", "rayClusterSpec", "authOptions", "mode", to="tokens"), "'tokens' is not"),
        (
            changed("spec", "rayClusterSpec", "headGroupSpec", "template"),
            "'template' is a required",
        ),
        (
            changed("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas", to="4"),
            "'4' is not of type",
        ),
        (changed("spec", "shutdownAfterJobFinishes", to="yes"), "'yes' is not of type 'boolean'"),
    ],
)
def test_a_mistake_in_the_ray_job_would_be_noticed(change, said):
    job = documented_job()
    change(job)
    assert any(said in defect for defect in defects(job))


def parameters(name):
    return random_backbone(name, "meta").model.parameters()


def test_gpu_nodes_are_spot(cluster):
    """That a study survives the loss of a node is tested in tests/end_to_end."""
    options = cluster["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"]
    assert options == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in cluster["available_node_types"]["head"]["node_config"]


def test_the_example_records_on_the_heads_server(cluster):
    (server,) = re.findall(r"--host (\S+) --port (\d+)", mlflow_block(cluster))
    assert f"--tracking-uri http://{':'.join(server)}'" in RAW
    assert "RAY_ADDRESS=auto python studies/pareto_search.py" in RAW  # else it starts a Ray


def as_another_user(folder):
    """PostgreSQL's programs, of which the server's run as the user that Debian makes for it."""
    folder.mkdir(exist_ok=True)
    for program in postgres_folder().iterdir():
        user = "setpriv --reuid postgres --regid postgres --clear-groups"
        other = f"{user} " if program.name in ("initdb", "pg_ctl") else ""
        (folder / program.name).write_text(f'#!/bin/sh\nexec {other}{program} "$@"\n')
        (folder / program.name).chmod(0o755)
    return folder


class Head:
    """Runs the block that starts MLflow as the launcher does, in folders of its own."""

    def __init__(self, config, folder):
        self.disk, self.shared, self.port = folder / "disk", folder / "shared", free_port()
        self.disk.mkdir(mode=0o700)
        self.shared.mkdir(exist_ok=True)
        programs = "/usr/lib/postgresql/*/bin"
        if os.geteuid() == 0:  # as who PostgreSQL refuses to run
            folder.chmod(0o755)
            shutil.chown(self.disk, "postgres", "postgres")
            programs = as_another_user(folder / "programs")
        self._block = (
            mlflow_block(config)
            .replace("/srv/mlflow", str(self.disk))
            .replace("/mnt/studies", str(self.shared))
            .replace("/usr/lib/postgresql/*/bin", str(programs))
            .replace("5000", str(self.port))
            .replace("sleep 600", "sleep 1")
            .replace("--workers 2", "--workers 1")
        )
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        done = subprocess.run(
            ["bash", "-c", f"export OMP_NUM_THREADS=1 && ({self._block})"],
            cwd=self.disk,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        log = self.disk / "server.log"
        shown = log.read_text()[-2000:] if log.exists() else ""
        assert done.returncode == 0, done.stdout + done.stderr + shown

    @property
    def _environment(self):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.disk), "PYTHONPATH": ""}

    def processes(self):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.disk):
                    found.append(process)
        return found

    def end(self):
        """As a head that is taken away."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes)

    def copied(self):
        """Wait for a copy of the database that was begun from now on."""
        copy, now = self.shared / "mlflow" / "database", time.time()
        deadline = time.monotonic() + 120
        while not copy.exists() or copy.stat().st_mtime < now + 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.skipif(
    postgres_folder() is None,
    reason="needs PostgreSQL, which `make browser` installs for root on Debian",
)
@pytest.mark.timeout(900)
def test_mlflow_outlives_the_head(cluster):
    with tempfile.TemporaryDirectory(prefix="vgid", dir="/tmp") as short:
        head = Head(cluster, Path(short))
        try:
            head.start()
            run = MlflowClient(head.uri).create_run("0", run_name="before").info.run_id
            MlflowClient(head.uri).log_text(run, "kept", "note.txt")
            before = {process.pid for process in head.processes()}
            head.start()  # as `ray up` does where all is up
            servers = [p for p in head.processes() if "mlflow server" in " ".join(p.cmdline())]
            assert servers and {process.pid for process in servers} <= before
            addresses = set()
            for process in head.processes():
                with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    found = process.net_connections()
                    addresses |= {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
            assert addresses == {"127.0.0.1"}
            head.copied()
            head.end()
            shutil.rmtree(head.disk)
            head = Head(cluster, Path(short))
            head.start()
            client = MlflowClient(head.uri)
            assert client.get_run(run).info.run_name == "before"
            assert [file.path for file in client.list_artifacts(run)] == ["note.txt"]
        finally:
            head.end()
