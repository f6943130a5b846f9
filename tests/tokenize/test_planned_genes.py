"""A plan is made once for equal gene tables, and anew for any that differs."""

from __future__ import annotations

import pandas as pd

from scfm.tokenize.planned_genes import PlannedGenes


def test_equal_tables_share_a_plan_and_others_do_not() -> None:
    made = []

    def plan(genes: pd.DataFrame, species: str):
        made.append((list(genes.index), species))
        return len(made), None

    planned = PlannedGenes(plan)
    table = pd.DataFrame({"name": ["a", "b"]}, index=["x", "y"])
    assert planned.of(table, "human")[0] == 1
    assert planned.of(table.copy(), "human")[0] == 1
    assert planned.of(table, "mouse")[0] == 2
    assert planned.of(table[::-1], "human")[0] == 3
    assert planned.of(table.rename(index={"x": "z"}), "human")[0] == 4
    table.loc["x", "name"] = "c"  # changed in place by its owner
    assert planned.of(table, "human")[0] == 5
    assert planned.of(table, "human")[0] == 5


def test_few_tables_are_kept_and_the_last_used_stay() -> None:
    made = []

    def plan(genes: pd.DataFrame, species: str):
        made.append(species)
        return len(made), None

    planned = PlannedGenes(plan)
    tables = [pd.DataFrame(index=[str(number)]) for number in range(20)]
    for table in tables:
        planned.of(table, "human")
        planned.of(tables[0], "human")
    assert len(made) == 20
    planned.of(tables[1], "human")
    assert len(made) == 21
