"""A benchmark in a bucket of a real S3 server on loopback, read as the same folder on a disk."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from pyarrow import fs

from studies import pareto_search
from tests.data.buckets import s3_server, upload
from tests.test_paths import vgid
from vgid.config import StudyConfig
from vgid.data.address import local
from vgid.data.benchmark import Benchmark
from vgid.data.check import check_benchmark
from vgid.data.synthetic import write_benchmark
from vgid.errors import InputError
from vgid.study.plan import make_plan

ADDRESS = Path("s3://people/v1")  # as a command line makes it: with one slash


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("benchmark") / "data"
    write_benchmark(made)
    return made


@pytest.fixture(scope="module")
def bucket(server, folder):
    upload(folder, "people", "v1/")
    client = boto3.client("s3")
    client.put_object(Bucket="people", Key="v1/other/large.bin", Body=b"not of the benchmark")
    return client


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vgid" / "benchmarks"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bucket_reads_as_the_folder_that_was_put_there(bucket, folder, cache):
    there, here = Benchmark.open(ADDRESS), Benchmark.open(folder)
    assert there.sha256 == here.sha256
    assert there.forget(5) == here.forget(5)
    shards = {name: content for name, content in files(folder).items() if name.endswith("parquet")}
    assert files(there.root) == shards
    assert check_benchmark(ADDRESS) == check_benchmark(folder)
    assert cache.stat().st_mode & 0o077 == 0


def test_it_is_copied_once_by_however_many_ask(bucket, folder, cache):
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(local, [ADDRESS, Path("s3://people/v1/")] * 4))
    (place,) = places
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [place.name]
    mark = place / "ft_Data" / "train-00000-of-00001.parquet"
    mark.write_bytes(b"mine")
    assert local(ADDRESS) == place
    assert mark.read_bytes() == b"mine"


def test_what_changes_there_is_copied_anew(bucket, folder, tmp_path):
    upload(folder, "changing")
    before = Benchmark.open(Path("s3://changing"))
    digest = before.sha256
    write_benchmark(tmp_path / "other", seed=1)
    upload(tmp_path / "other", "changing")
    after = Benchmark.open(Path("s3://changing"))
    assert after.sha256 == Benchmark.open(tmp_path / "other").sha256 != digest
    assert Benchmark.open(before.root).sha256 == digest


def test_a_copy_that_breaks_off_leaves_nothing_in_its_place(bucket, cache, monkeypatch):
    copied = []

    def breaks(source, *rest, **options):
        copied.append(source)
        if len(copied) == 3:
            raise OSError("the connection was reset")
        return copy(source, *rest, **options)

    copy = fs.copy_files
    monkeypatch.setattr(fs, "copy_files", breaks)
    with pytest.raises(InputError, match=r"cannot be read \(the connection was reset\)"):
        local(ADDRESS)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert len(files(local(ADDRESS))) == len(copied) - 3


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://people/none", "no MLLMU-Bench config"),
        ("s3://nobody/v1", "no MLLMU-Bench config"),
        ("gopher://people/v1", "Unrecognized filesystem type"),
        ("fsspec+sftp://127.0.0.1/v1", "paramiko"),  # the package that is missing
    ],
)
def test_what_cannot_be_read_is_one_sentence(bucket, tmp_path, capsys, address, said):
    output = tmp_path / "out"
    assert pareto_search.main(["--data", address, "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{address}: ") and told.count("\n") == 1
    assert re.search(said, told)
    assert not output.exists()


def test_nobody_answers(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert vgid(["data", "check", "s3://people/v1"]) == 2
    told = capsys.readouterr().err
    assert "Could not connect to server" in told and "AWS_ENDPOINT_URL" in told
    assert "of-the-test" not in told and told.count("\n") == 1


def test_credentials_are_not_taken_from_an_address(capsys, tmp_path):
    address = "s3://reader:hush-hush@people/v1"
    assert pareto_search.main(["--data", address, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "s3://people/v1 was given with credentials" in told
    assert "hush" not in told and told.count("\n") == 1
    assert vgid(["data", "check", "gopher://reader:hush-hush@people/v1"]) == 2
    assert "hush" not in capsys.readouterr().err


def test_a_study_is_to_have_a_copy_and_a_plan_writes_nothing(bucket, folder, tmp_path):
    plan = make_plan(StudyConfig(data=ADDRESS, output=tmp_path / "out", trials=1))
    assert "Data: s3://people/v1" in plan.lines()
    assert plan.request.data == tmp_path / "out" / "data"
    assert plan.benchmark.sha256 == Benchmark.open(folder).sha256
    assert not (tmp_path / "out").exists()


def test_a_resume_reads_what_the_study_kept(bucket, folder, tmp_path, monkeypatch):
    config = StudyConfig(data=ADDRESS, output=tmp_path / "out", trials=1)
    shutil.copytree(folder, tmp_path / "out" / "data")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    plan = make_plan(config)
    assert plan.benchmark.sha256 == Benchmark.open(folder).sha256
    stored = json.loads(config.model_dump_json())
    assert stored["data"] == "s3://people/v1"
    assert StudyConfig.model_validate(stored) == config
