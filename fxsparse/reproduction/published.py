"""The published test accuracies on CIFAR-10 with WideResNet-22-2, as data, and which of our methods each row is.

Source of every figure, unless it says otherwise: Sundar and Dwaraknath, "[Reproducibility Report] Rigging the
Lottery: Making All Tickets Winners", ML Reproducibility Challenge 2020 (arXiv 2103.15767). Accuracies are in
percent; a spread is the standard deviation over three seeds that stands behind the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

HELD_OUT = 5_000  # training images of the split that Tables 2 and 5 were made with
SPLITS = (45_000, 50_000)
"""Images trained on: with 5,000 of the training set held out, and with all of it."""


@dataclass(frozen=True)
class Figure:
    """A published accuracy in percent; None where the source gives no spread."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class PublishedRow:
    """A line of the tables: a method under a distribution, and what was published of it.

    Attributes:
        label: the method as the report calls it.
        distribution: "uniform" (the report's Random), "erk", or None where the row names none.
        images: one of `SPLITS`.
        options: of `TrainConfig`, over the recipe's.
        figures: density -> accuracy; the densities are those that the row is run at. None where a row is run
            for its context and has no figure.
        source: the table it stands in.
        remark: in what the row that is run here differs from the published one.
    """

    label: str
    distribution: str | None
    images: int
    options: Mapping[str, Any]
    figures: Mapping[float, Figure | None]
    source: str
    remark: str = ""


_METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "small-dense": {"method": "small-dense"},
    "static": {"method": "static"},
    "SET": {"method": "set"},
    "RigL": {"method": "rigl"},
    "RigL 2x": {"method": "rigl", "extend": 2.0},
    "SNFS": {"method": "snfs"},
    # the first layer stays dense, all others are ranked together, as in the report's code
    "pruning": {"method": "pruning", "distribution": "uniform", "method_options": {"scope": "global"}},
    "RigL-SG": {"method": "rigl-sg"},
    "RigL-SM": {"method": "rigl-sm"},
    "RigL-struct": {"method": "rigl-struct"},
}
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(_METHODS)
"""Label -> options of `TrainConfig`."""

_STRUCT = "ours cuts whole channels and keeps the classifier dense; the report's masks single kernels"
_PRUNING = "one ranking over all layers but the first"
_CONTEXT = "not in the report with this split; run for its place beside the others"


def _row(
    label: str,
    distribution: str | None,
    source: str,
    figures: Mapping[float, tuple[float, float | None] | None],
    images: int = 45_000,
    remark: str = "",
) -> PublishedRow:
    options = dict(_METHODS[label])
    if distribution is not None:
        options["distribution"] = distribution
    published = {density: Figure(*figure) if figure else None for density, figure in figures.items()}
    return PublishedRow(label, distribution, images, options, published, source, remark)


TABLE_2 = (
    _row("dense", None, "Table 2", {1.0: (93.4, 0.07)}),
    _row("small-dense", None, "Table 2", {0.1: (89.0, 0.35), 0.2: (91.0, 0.07)}),
    _row("static", "uniform", "Table 2", {0.1: (89.1, 0.17), 0.2: (91.2, 0.16)}),
    _row("static", "erk", "", {0.1: None, 0.2: None}, remark=_CONTEXT),
    _row("SET", "uniform", "Table 2", {0.1: (91.3, 0.47), 0.2: (92.7, 0.28)}),
    _row("SET", "erk", "Table 2", {0.1: (92.2, 0.04), 0.2: (92.9, 0.16)}),
    _row("RigL", "uniform", "Table 2", {0.1: (91.7, 0.18), 0.2: (92.6, 0.10)}),
    _row("RigL", "erk", "Table 2", {0.1: (92.4, 0.06), 0.2: (93.1, 0.09)}),
    _row("RigL 2x", "uniform", "Table 2", {0.1: (92.3, 0.25), 0.2: (93.0, 0.21)}),
    _row("RigL 2x", "erk", "Table 2", {0.1: (92.7, 0.37), 0.2: (93.3, 0.09)}),
    _row("SNFS", "uniform", "Table 2", {0.1: (92.4, 0.43), 0.2: (92.7, 0.20)}),
    _row("SNFS", "erk", "Table 2", {0.1: (92.2, 0.2), 0.2: (92.8, 0.07)}),
    _row("pruning", None, "Table 2", {0.1: (92.6, 0.08), 0.2: (93.2, 0.27)}, remark=_PRUNING),
    _row("RigL-SG", "uniform", "Table 5", {0.1: (92.2, 0.17), 0.2: (92.7, 0.25)}),
    _row("RigL-SM", "uniform", "Table 5", {0.1: (92.2, 0.20), 0.2: (92.9, 0.21)}),
    _row("RigL-struct", "uniform", "supplement", {0.1: (87.0, 0.09), 0.2: (90.4, 0.27)}, remark=_STRUCT),
    _row("RigL-struct", "erk", "supplement", {0.1: (89.6, 0.16), 0.2: (91.3, 0.18)}, remark=_STRUCT),
)
"""45,000 images to train on: Table 2, Table 5 and the supplement."""

TABLE_1 = (
    _row("dense", None, "Table 1", {1.0: (94.6, None)}, 50_000, "the paper (Evci et al. 2020): 94.1"),
    _row("static", "erk", "Table 1", {0.1: (91.6, None), 0.2: (93.2, None), 0.5: (94.3, None)}, 50_000),
    _row("pruning", None, "Table 1", {0.1: (93.2, None), 0.2: (93.6, None), 0.5: (94.3, None)}, 50_000, _PRUNING),
    _row("RigL", "erk", "Table 1", {0.1: (93.2, None), 0.2: (93.8, None), 0.5: (94.4, None)}, 50_000),
)
"""All 50,000 images: Table 1."""

ROWS = TABLE_2 + TABLE_1


@dataclass(frozen=True)
class Place:
    """One accuracy of the tables: a row at one of its densities."""

    row: PublishedRow
    density: float

    @property
    def figure(self) -> Figure | None:
        """What was published."""
        return self.row.figures[self.density]


_PLACES = {
    (row.label, row.distribution, row.images, density): Place(row, density) for row in ROWS for density in row.figures
}


def place(label: str, distribution: str | None, density: float, images: int = 45_000) -> Place:
    """The accuracy that a method, distribution, density and split name; KeyError if there is none."""
    return _PLACES[label, distribution, images, density]


def all_places() -> list[Place]:
    """Every accuracy, in the order of the tables."""
    return list(_PLACES.values())
