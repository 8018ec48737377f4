"""A study whose data come from a bucket, and whose results go to one by an MLflow server."""

import json
import sys

import boto3
import pytest

from tests.browser.servers import mlflow_server
from tests.data.buckets import s3_server, upload
from tests.end_to_end.light import SESSION, LightSession, LightStudy
from vgid.data.benchmark import Benchmark
from vgid.report.study_page import FIGURES
from vgid.study.finished import open_source

TRIALS = 3


class Unlogged(LightSession):
    """Fails its trials where a worker knows MLflow."""

    def epoch(self, trial_id, number):
        if "mlflow" in sys.modules:
            raise AssertionError("only the driver writes to MLflow")
        (self.request.store.parent / "asked").touch()
        super().epoch(trial_id, number)


def contents(client, bucket):
    listed = client.list_objects_v2(Bucket=bucket)
    assert not listed["IsTruncated"]
    keys = [item["Key"] for item in listed.get("Contents", ())]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize(
    "artifacts",
    [
        ["--artifacts-destination", "s3://results/studies"],  # through the server
        ["--no-serve-artifacts", "--default-artifact-root", "s3://results/studies"],  # past it
    ],
    ids=["served", "direct"],
)
def test_a_study_from_bucket_to_bucket(data, tmp_path, artifacts):
    served = artifacts[0] == "--artifacts-destination"
    with s3_server(), mlflow_server(f"sqlite:///{tmp_path}/m.db", tmp_path, *artifacts) as uri:
        client = boto3.client("s3")
        client.create_bucket(Bucket="results")
        upload(data, "people", "v1/")
        flags = ["--data", "s3://people/v1", "--tracking-uri", uri]
        session = {SESSION: f"{Unlogged.__module__}:{Unlogged.__name__}"}
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        with LightStudy(tmp_path, TRIALS, *flags, epochs=2, **session, **cache) as study:
            assert study.finish() == 0, study.shown()
            study.assert_consistent(uri)
            output = study.output
            summary = json.loads((output / "study.json").read_text())
            assert summary["counts"]["completed"] == TRIALS
            assert summary["data_sha256"] == Benchmark.open(data).sha256
            header = json.loads((output / "trials" / "study.json").read_text())
            assert header["config"]["data"] == "s3://people/v1"
            assert Benchmark.open(output / "data").sha256 == summary["data_sha256"]
            assert not (output / "mlflow.db").exists()
            assert (output / "asked").exists()  # of each worker, whether it knows MLflow
            source = open_source(str(output), None, tmp_path)
            assert source.request(tmp_path / "store", None, None).data == output / "data"

            # All of it is in the bucket, byte for byte.
            kept = list(contents(client, "results").values())
            for name in range(TRIALS):
                for file in (output / "adapters" / f"{name:04d}").iterdir():
                    assert file.read_bytes() in kept, file
            for name in ("trials.csv", "front.csv", *FIGURES):
                assert (output / name).read_bytes() in kept, name

            if served:  # and the data need not be there any more
                for key in contents(client, "people"):
                    client.delete_object(Bucket="people", Key=key)
                study.start("--resume")
                assert study.finish() == 0, study.shown()
                study.assert_consistent(uri)
