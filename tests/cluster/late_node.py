"""A node that joins late and does not see the folder takes no job; `make test-storage` runs it."""

import json
import re

import pytest

from tests.cluster.nodes import WITHOUT_ROOT, can_be_alone, run_alone


@pytest.mark.skipif(not can_be_alone(), reason=WITHOUT_ROOT)
def test_a_late_node_without_the_folder_costs_a_study_nothing(tmp_path):
    done = run_alone("tests.cluster.late", str(tmp_path / "shared"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["code"] == 130  # it was told to stop
    shown = " ".join(found["shown"].split())
    said = re.findall(r"A slot is not used: (ray: node 127\.0\.0\.2 .*? with --output\.)", shown)
    assert len(said) == 1 and f"does not see {tmp_path}" in said[0].replace("\n", "")
    records = [
        json.loads(path.read_text())
        for path in (tmp_path / "shared" / "study" / "trials").glob("0*.json")
    ]
    ended = [record["result"] for record in records if record["result"]]
    assert len(ended) > 3 and {result["status"] for result in ended} == {"completed"}
    assert not any(record["failures"] for record in records)
    print(f"{len(ended)} trials completed; {said[0]}")
