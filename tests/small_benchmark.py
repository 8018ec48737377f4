"""The synthetic benchmark with a few of its people, all as it has them.

For tests that train and score: a teacher of 14 people in place of 95 takes a second less of five,
and each epoch and evaluation half of what it would.
"""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vgid.data.layout import CONFIGS, shard_paths
from vgid.data.synthetic import write_benchmark


def write_small(root: Path, forget: int = 3, more: int = 0, others: int = 14) -> None:
    """Write it to ``root``, which is new.

    Args:
        root: folder of the benchmark.
        forget: people of ``forget_5``.
        more: people that each larger forget set has beside those of the smaller ones.
        others: people of each retain set; and at most so many celebrities.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "data"
        write_benchmark(whole)
        kept, seen = set[str](), set[str]()
        counts = {"forget_5": forget, "forget_10": more, "forget_15": more}
        for config, count in {**counts, "retain_85": others, "Retain_Set": others}.items():
            ids = pq.read_table(whole / config, columns=["ID"])["ID"].to_pylist()
            new = [person for person in ids if person not in seen]
            seen.update(new)
            if count:  # from all over, so that both shards of the test set hold some
                kept.update(new[:: max(1, len(new) // count)][:count])
        for config in CONFIGS:
            for path in shard_paths(whole, config):
                table = pq.read_table(path)
                rows = [row for row in table.to_pylist() if row["ID"] in kept]
                target = root / path.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), target)
