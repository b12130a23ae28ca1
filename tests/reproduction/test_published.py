"""The figures, against the tables as a person copied them."""

import re

import pytest

from fxsparse.reproduction.published import ROWS, all_places, place

# mean +- deviation at density 0.1 | 0.2; two are uniform / ERK
TABLES = """
static, uniform | 89.1 +- 0.17 | 91.2 +- 0.16
SET, uniform / ERK | 91.3 +- 0.47 / 92.2 +- 0.04 | 92.7 +- 0.28 / 92.9 +- 0.16
RigL, uniform / ERK | 91.7 +- 0.18 / 92.4 +- 0.06 | 92.6 +- 0.10 / 93.1 +- 0.09
RigL 2x, uniform / ERK | 92.3 +- 0.25 / 92.7 +- 0.37 | 93.0 +- 0.21 / 93.3 +- 0.09
SNFS, uniform / ERK | 92.4 +- 0.43 / 92.2 +- 0.2 | 92.7 +- 0.20 / 92.8 +- 0.07
pruning | 92.6 +- 0.08 | 93.2 +- 0.27
RigL-SG, uniform | 92.2 +- 0.17 | 92.7 +- 0.25
RigL-SM, uniform | 92.2 +- 0.20 | 92.9 +- 0.21
RigL-struct, uniform / ERK | 87.0 +- 0.09 / 89.6 +- 0.16 | 90.4 +- 0.27 / 91.3 +- 0.18
small-dense | 89.0 +- 0.35 | 91.0 +- 0.07
"""
TABLE_1 = {"static": (91.6, 93.2, 94.3), "pruning": (93.2, 93.6, 94.3), "RigL": (93.2, 93.8, 94.4)}


@pytest.mark.parametrize("line", TABLES.strip().splitlines())
def test_every_row_of_tables_2_and_5(line):
    name, *columns = line.split("|")
    label, _, where = name.strip().partition(", ")
    distributions = [each.strip().lower() for each in where.split("/")] if where else [None]
    for density, column in zip((0.1, 0.2), columns, strict=True):
        figures = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) \+- ([\d.]+)", column)]
        for distribution, figure in zip(distributions, figures, strict=True):
            found = place(label, distribution, density).figure
            assert (found.mean, found.spread) == figure


def test_table_1_and_dense():
    for label, means in TABLE_1.items():
        distribution = None if label == "pruning" else "erk"
        for density, mean in zip((0.1, 0.2, 0.5), means, strict=True):
            assert place(label, distribution, density, 50_000).figure.mean == mean
    assert place("dense", None, 1.0, 50_000).figure.mean == 94.6
    assert "94.1" in place("dense", None, 1.0, 50_000).row.remark
    dense = place("dense", None, 1.0).figure
    assert (dense.mean, dense.spread) == (93.4, 0.07)


def test_nothing_else_has_a_figure():
    copied = sum(len(re.findall(r"\+-", line)) for line in TABLES.splitlines()) + 1 + 9 + 1
    assert sum(each.figure is not None for each in all_places()) == copied
    assert all(row.source for row in ROWS if any(row.figures.values()))
    assert all(row.remark for row in ROWS if not all(row.figures.values()))
