"""Where a claim's values come from: our tables, or the paper's own numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vgid.paper.printed import paper_row
from vgid.paper.tables import FilledTable, Table


class Evidence(Protocol):
    """Where values come from: our tables, or the paper's."""

    @property
    def seeds(self) -> int:
        """How many values a cell has."""

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """One value a seed of a cell; Nones if there is no such table or row."""


@dataclass(frozen=True)
class OurEvidence:
    """The filled tables of one backbone, by number."""

    tables: Mapping[int, FilledTable]

    @property
    def seeds(self) -> int:
        """How many values a cell has."""
        return max((len(table.seeds) for table in self.tables.values()), default=0)

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """One value a seed of a cell."""
        if table not in self.tables:
            return [None] * self.seeds
        return self.tables[table].values(key, metric)


@dataclass(frozen=True)
class PaperEvidence:
    """The paper's own tables for one of its backbones; rows are found by our keys."""

    tables: Mapping[int, Table]
    backbone: str

    @property
    def seeds(self) -> int:
        """The paper prints one number a cell."""
        return 1

    def values(self, table: int, key: str, metric: str) -> list[float | None]:
        """The number of a cell."""
        for row in self.tables[table].rows if table in self.tables else ():
            if row.key == key:
                found = paper_row(table, self.backbone, row.paper, row.setting)
                return [None if found is None else found.scores.get(metric)]
        return [None]
