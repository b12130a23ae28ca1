"""The YAML file: what is read, what is refused in one line, which row a reference means."""

import pytest

from fxsparse.core.errors import ConfigError
from fxsparse.studies.comparison import parse_comparison, read_comparison
from fxsparse.studies.yaml_file import read_yaml

WRONG = [
    ("methods: [", ["line 1"]),
    ("- rigl", ["mapping", "methods"]),
    ("seeds: [0]", ["methods is missing"]),
    ("methods: [rigl]\nsparsity: [0.9]", ["'sparsity'", "did you mean sparsities"]),
    ("methods: [rigl]\nmethods: [set]", ["line 2", "'methods' is given twice"]),
    ("methods: []", ["methods", "at least one"]),
    ("methods: [{label: x}]", ["label", "key method"]),
    ("methods: [{method: rigl, drop_fracton: 0.1}]", ["rigl", "'drop_fracton'", "drop_fraction"]),
    ("methods: [{method: rigl, seed: 3}]", ["seed", "seeds"]),
    ("methods: [{method: rigl, flops: 0.3}]", ["flops", "sparsities"]),
    ("methods: [rigl]\noptions: {stepz: 3}", ["'stepz'", "did you mean steps"]),
    ("methods: [rigl]\noptions: {seed: 3}", ["options", "seed", "seeds"]),
    ("methods: [rigl]\noptions: {method: rigl}", ["options", "methods"]),
    ("methods: [rigl]\nseeds: [0, 0]", ["seeds", "0 is given twice"]),
    ("methods: [rigl]\nseeds: [0.5]", ["seeds", "0.5", "whole number"]),
    ("methods: [rigl]\nsparsities: [high]", ["sparsities", "'high'", "a number"]),
    ("methods: [rigl]\ndistributions: []", ["distributions", "at least one"]),
    ("methods: [rigl, rigl]", ["methods", "'rigl' is given twice"]),
    ("methods: [{method: rigl, label: RigL 2x}, {method: set, label: rigl-2X}]", ["two rows", "label"]),
    ("methods: [{method: rigl, label: '!'}]", ["'!'", "letters"]),
    ("methods: [rigl]\ntitle: [a]", ["title", "text"]),
    ("methods: [rigl]\ngroup_factor: 0.5", ["group_factor", "0.5"]),
    ("methods: [{method: rigl, weights_from: {label: statik}}, static]", ["'statik'", "did you mean static"]),
    ("methods: [{method: rigl, weights_from: {metod: static}}]", ["weights_from", "{label: ROW}"]),
    ("methods: [{method: rigl, weights_from: {method: set}}, set, {method: set, decay: linear}]", ["set", "2 rows"]),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[text for text, _ in WRONG])
def test_what_is_wrong_is_one_line_with_the_files_name(text, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_comparison(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    for part in said:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"could not read .*c\.yaml: No such file"):
        read_comparison(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "+1E-03", ".1e-2", "0.001"])
def test_numbers_are_numbers(text, tmp_path):
    (tmp_path / "n.yaml").write_text(f"lr: {text}\nname: 1e-3x")
    assert read_yaml(tmp_path / "n.yaml") == {"lr": 0.001, "name": "1e-3x"}


def test_what_is_not_given_is_what_train_does():
    comparison = parse_comparison({"methods": "rigl"}, "")
    assert (comparison.sparsities, comparison.distributions, comparison.seeds) == ((0.9,), ("erk",), (0,))
    assert [(row.label, row.method) for row in comparison.rows] == [("rigl", "rigl")]


def test_a_label_tells_what_the_row_changes():
    rows = ["rigl", {"method": "rigl", "drop_fraction": 0.5}, {"method": "set", "distribution": "er"}]
    comparison = parse_comparison({"methods": rows}, "")
    assert [row.label for row in comparison.rows] == ["rigl", "rigl, drop_fraction 0.5", "set"]


def test_lottery_refers_to_the_pruning_row_or_to_one_of_its_own():
    comparison = parse_comparison({"methods": ["lottery", {"method": "pruning", "label": "Pruning"}]}, "")
    assert [(row.label, dict(row.references), row.shown) for row in comparison.rows] == [
        ("lottery", {"masks_from": "Pruning"}, True),
        ("Pruning", {}, True),
    ]
    comparison = parse_comparison({"methods": ["lottery", {"method": "rigl", "masks_from": {"method": "pruning"}}]}, "")
    assert [(row.label, dict(row.references), row.shown) for row in comparison.rows] == [
        ("lottery", {"masks_from": "pruning"}, True),
        ("rigl, masks_from pruning", {"masks_from": "pruning"}, True),
        ("pruning", {}, False),
    ]


def test_a_reference_with_options_means_the_row_that_has_them():
    rows = ["static", {"method": "static", "decay": "linear"}]
    reference = {"method": "rigl", "weights_from": {"method": "static", "decay": "linear"}}
    comparison = parse_comparison({"methods": [*rows, reference]}, "")
    assert comparison.rows[2].references == {"weights_from": "static, decay linear"}
    assert len(comparison.rows) == 3


def test_a_path_is_left_alone():
    comparison = parse_comparison({"methods": [{"method": "lottery", "masks_from": "runs/pruned"}]}, "")
    assert comparison.rows[0].options == {"masks_from": "runs/pruned"} and not comparison.rows[0].references
