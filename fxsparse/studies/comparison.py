"""What to compare: rows (a method and its options) x sparsities x distributions x seeds, from a YAML file.

    options: {data: digits, model: small_resnet, steps: 2000}     # of every run
    methods:
      - static
      - {method: rigl, extend: 2, label: RigL 2x, distribution: uniform}
      - {method: rigl, weights_from: {method: static}, label: RigL from static}
    sparsities: [0.9, 0.95]
    distributions: [uniform, erk]
    seeds: [0, 1, 2]

A row may set any option of `TrainConfig`; pairs (`model_options`) are added to the shared ones. The options
that name another run's folder may name a row instead: by its label, or by its method, and a method that is
not among the rows is trained without a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError, check_number, nearest
from fxsparse.studies.yaml_file import read_yaml
from fxsparse.training.config import TrainConfig, config_options, shown

LISTS = {"method": "methods", "sparsity": "sparsities", "distribution": "distributions", "seed": "seeds"}
KEYS = ("title", "notes", "group_factor", "options", *LISTS.values())
ROW_KEYS = ("method", "label", "group")  # beside the options of TrainConfig
REFERENCES = ("weights_from", "masks_from", "densities_from")
DEFAULT_REFERENCES = {"lottery": {"masks_from": {"method": "pruning"}}}
GROUP_FACTOR = 1.5
"""At the densities and intervals of the report, RigL's dense gradients (a tenth and less) stay inside a group, and
ERK's dearer layers (1.7 times) do not."""
QUIET = {"plots": False, "tensorboard": False}  # of each run; `options` may turn them on


@dataclass(frozen=True)
class Row:
    """One row of the table, before sparsities, distributions and seeds are filled in.

    Attributes:
        options: of `TrainConfig`, over the shared ones.
        references: option -> label of the row whose run of the same sparsity, distribution and seed it names.
        group: a heading to stand under instead of one by FLOPs.
        shown: False for a row that only others need.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    shown: bool = True

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")


@dataclass(frozen=True)
class Comparison:
    """The contents of the YAML file; `source` is its path, for messages.

    Attributes:
        group_factor: training FLOPs of a group's dearest line over its cheapest, at most.
    """

    source: str
    rows: tuple[Row, ...]
    options: Mapping[str, Any]
    sparsities: tuple[float, ...]
    distributions: tuple[str, ...]
    seeds: tuple[int, ...]
    title: str
    notes: str
    group_factor: float = GROUP_FACTOR


def read_comparison(path: str | Path) -> Comparison:
    """The comparison that the YAML file at `path` describes.

    Raises:
        ConfigError: what is wrong, in one line, with the file's name and near names; values of options are
            checked by `make_plan`.
    """
    try:
        return parse_comparison(read_yaml(path), str(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if str(path) in message else f"{path}: {message}") from error


def parse_comparison(values: Any, source: str) -> Comparison:
    """The comparison in the plain values of a YAML file."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the file holds no mapping; it needs the key methods, and may have {', '.join(KEYS)}")
    _check_keys(values, KEYS, "key")
    if "methods" not in values:
        raise ConfigError("the key methods is missing: a list of methods to compare")
    options = values.get("options") or {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"options is {options!r}; it takes options of fxsparse train by name")
    _check_keys(options, config_options(), "option")
    for name in (*LISTS, "flops"):
        if name in options:
            raise ConfigError(f"options: {name} is not shared; give {LISTS.get(name, 'sparsities')} beside options")
    factor = values.get("group_factor", GROUP_FACTOR)
    check_number("group_factor", factor)
    if factor < 1:
        raise ConfigError(f"group_factor is {factor}; it must be 1 or more")
    rows = [_parse_row(entry) for entry in _list_of(values, "methods", options, Any)]
    return Comparison(
        source=source,
        rows=tuple(_with_references(rows)),
        options=QUIET | dict(options),
        sparsities=tuple(float(each) for each in _list_of(values, "sparsities", options, float)),
        distributions=tuple(_list_of(values, "distributions", options, str)),
        seeds=tuple(_list_of(values, "seeds", options, int)),
        title=_text(values, "title"),
        notes=_text(values, "notes"),
        group_factor=factor,
    )


def _parse_row(entry: Any) -> tuple[Row, dict[str, Any]]:
    """A row, and its references as they were written: option -> mapping."""
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise ConfigError(f"methods: {entry!r} is neither a method's name nor a mapping with the key method")
    method = entry["method"]
    _check_keys(entry, (*ROW_KEYS, *config_options()), f"methods: {method}: option")
    for name in ("seed", "flops"):
        if name in entry:
            raise ConfigError(f"methods: {method}: {name} is not a row's; give {LISTS.get(name, 'sparsities')}")
    own = {name: value for name, value in entry.items() if name not in ROW_KEYS}
    written = {name: own.pop(name) for name in REFERENCES if isinstance(own.get(name), Mapping)}
    for name, target in DEFAULT_REFERENCES.get(method, {}).items():
        if name not in own:
            written.setdefault(name, target)
    label = _text(entry, "label") or _default_label(method, own, entry)
    return Row(label, method, own, group=_text(entry, "group") or None), written


def _default_label(method: str, own: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The method, and what tells its row from others: `rigl, extend 2`."""
    parts = [f"{name} {shown(value)}" for name, value in own.items() if name not in LISTS]
    parts += [
        f"{name} {' '.join(map(str, value.values()))}"
        for name, value in entry.items()
        if name in REFERENCES and isinstance(value, Mapping)
    ]
    return ", ".join([method, *parts])


def _with_references(parsed: Sequence[tuple[Row, dict[str, Any]]]) -> list[Row]:
    """The rows with their references as labels, behind them those that are only referred to."""
    rows, written = [row for row, _ in parsed], [references for _, references in parsed]
    done: list[Row] = []
    while len(done) < len(rows):
        row, references = rows[len(done)], {}
        for name, target in written[len(done)].items():
            found = _referred_to(target, rows, f"{row.label}: {name}")
            if found is None:
                hidden, of_hidden = _parse_row(target)
                found = Row(hidden.label, hidden.method, hidden.options, shown=False)
                rows.append(found)
                written.append(of_hidden)
            references[name] = found.label
        done.append(Row(row.label, row.method, row.options, references, row.group, row.shown))
    by_slug: dict[str, Row] = {}
    for row in done:
        if not row.slug:
            raise ConfigError(f"label: {row.label!r} has neither letters nor digits")
        if row.slug in by_slug:
            raise ConfigError(f"two rows are called {row.label!r}; give one of them a label of its own")
        by_slug[row.slug] = row
    return done


def _referred_to(target: Mapping[str, Any], rows: Sequence[Row], place: str) -> Row | None:
    """The row that a reference means; None if one has to be made."""
    if set(target) == {"label"}:
        found = next((row for row in rows if row.label == target["label"]), None)
        if found is None:
            labels = [row.label for row in rows]
            raise ConfigError(f"{place}: no row is called {target['label']!r}{nearest(str(target['label']), labels)}")
        return found
    if not isinstance(target.get("method"), str) or set(target) & {"label", "group", *LISTS} != {"method"}:
        raise ConfigError(
            f"{place} is {dict(target)}; it takes a run folder, {{label: ROW}}, or {{method: NAME}} with options"
        )
    asked = {name: value for name, value in target.items() if name != "method"}
    same = [row for row in rows if row.method == target["method"] and asked.items() <= dict(row.options).items()]
    if len(same) > 1:
        raise ConfigError(
            f"{place}: {target['method']} is the method of {len(same)} rows; say which with {{label: NAME}}: "
            f"{', '.join(row.label for row in same)}"
        )
    return same[0] if same else None


def _list_of(values: Mapping[str, Any], key: str, options: Mapping[str, Any], kind: Any) -> list[Any]:
    """The list at `key`, not empty, without repetition; a single value is a list of one.

    Without the key it is what `fxsparse train` does with the shared options.
    """
    if key in values:
        found = values[key]
    else:
        option = next(name for name, listed in LISTS.items() if listed == key)
        found = getattr(TrainConfig.from_dict(dict(options)).resolved(), option)
    if isinstance(found, (str, int, float, Mapping)):
        found = [found]
    if not isinstance(found, Sequence) or not found:
        raise ConfigError(f"{key} is {found!r}; it takes a list of at least one")
    for index, each in enumerate(found):
        if kind is not Any and (
            isinstance(each, bool) or not isinstance(each, (int, float) if kind is float else kind)
        ):
            raise ConfigError(f"{key}: {each!r} is not {_KINDS[kind]}")
        if each in found[:index]:
            raise ConfigError(f"{key}: {each!r} is given twice")
    return list(found)


_KINDS = {float: "a number", str: "text", int: "a whole number"}


def _text(values: Mapping[str, Any], key: str) -> str:
    found = values.get(key)
    if found is not None and not isinstance(found, (str, int, float)):
        raise ConfigError(f"{key} is {found!r}; it takes text")
    return "" if found is None else str(found).strip()


def _check_keys(values: Mapping[str, Any], known: Any, what: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{name!r} is not known as {what}{nearest(str(name), known)}")
