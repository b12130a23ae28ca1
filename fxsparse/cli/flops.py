"""`fxsparse flops`: what a model costs, dense and sparse, in the form that the reader needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxsparse.channels import ChannelGroups, channel_groups
from fxsparse.cli.key_values import key_values
from fxsparse.cli.subjects import Subject, make_subject
from fxsparse.core.aten_costs import CATEGORIES
from fxsparse.core.errors import ConfigError, FxSparseError, nearest
from fxsparse.flops.comparison import compare
from fxsparse.flops.flop_counts import CONVENTIONS
from fxsparse.flops.flop_report import FlopReport
from fxsparse.flops.formats import FORMATS, render
from fxsparse.flops.planning import plan_flops
from fxsparse.flops.training import phases_of, step_cost, training_cost
from fxsparse.runtime.methods import Need, make_method, methods
from fxsparse.runtime.schedule import UpdateSchedule

STRICT_FAILURE = 1

EXAMPLES = """examples:
  fxsparse flops resnet50 --input 1,3,224,224 --sparsity 0.9 --distribution erk
  fxsparse flops wide_resnet22_2 --flops 0.2 --depth 1     the sparsity that costs a fifth of dense
  fxsparse flops vit_l_16 --format html --output vit.html
  fxsparse flops my_package.nets:make --options width=2 --input 1,3,64,64
  fxsparse flops --checkpoint runs/static                   a run, as sparse as it is now
  fxsparse flops resnet50 --compare sparsity=0.9,distribution=erk sparsity=0.9,distribution=uniform
"""

PLAN_OPTIONS = {
    "sparsity": float,
    "flops": float,
    "distribution": str,
    "include": str,
    "exclude": str,
    "dense": str,
    "power": float,
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "flops",
        help="count what a model costs, dense and sparse",
        description="Count what a model costs, dense and sparse, layer by layer, without running it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="a network of models/ or torchvision, or package.module:factory")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the network")
    parser.add_argument(
        "--input", action="append", default=[], metavar="SHAPE", help="1,3,224,224 or 1,16:int64; once an argument"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="a run folder, its checkpoint, or a saved state_dict")

    sparse = parser.add_argument_group("sparsity")
    sparse.add_argument("--sparsity", type=float, metavar="X", help="fraction of the weights removed, in [0, 1)")
    sparse.add_argument("--flops", type=float, metavar="X", help="instead: cost over the dense cost, in (0, 1]")
    sparse.add_argument("--distribution", default="erk", metavar="NAME", help="uniform, er or erk (default: erk)")
    sparse.add_argument("--power", type=float, default=1.0, metavar="X", help="exponent of er and erk (default: 1)")
    for name, text in (
        ("include", "only these weights are masked: names, globs, first, last, depthwise"),
        ("exclude", "these are not masked and not in the budget"),
        ("dense", "these stay dense inside the budget"),
    ):
        sparse.add_argument(f"--{name}", nargs="+", metavar="NAME", help=text)

    counting = parser.add_argument_group("counting")
    counting.add_argument("--convention", default="macs", metavar="NAME", help="macs, or micronet for the paper's")
    counting.add_argument(
        "--also", nargs="+", default=[], metavar="CATEGORY", help=f"count these too: {', '.join(CATEGORIES)}"
    )
    counting.add_argument("--strict", action="store_true", help="fail if an operation could not be counted")

    training = parser.add_argument_group("training")
    training.add_argument("--method", metavar="NAME", help=f"add the cost of a training step: {', '.join(methods())}")
    training.add_argument("--update-interval", type=int, default=100, metavar="N", help="steps between rewirings")
    training.add_argument("--steps", type=int, metavar="N", help="length of the run, for its total")
    training.add_argument("--batch-size", type=int, default=1, metavar="N", help="examples a step, for the total")
    training.add_argument("--exact-backward", action="store_true", help="count the gradients that are really computed")

    report = parser.add_argument_group("report")
    report.add_argument("--format", default="table", metavar="NAME", help=f"{', '.join(FORMATS)} (default: table)")
    report.add_argument("--depth", type=int, metavar="N", help="levels of modules to tell apart (default: every layer)")
    report.add_argument(
        "--no-channels", dest="channels", action="store_false", help="html without the groups of channels: quicker"
    )
    report.add_argument("--output", metavar="FILE", help="write there instead of to the terminal")
    report.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two configurations side by side, each [MODEL,]KEY=VALUE,... with the keys of sparsity",
    )


def run(arguments: argparse.Namespace) -> int:
    """Count and print; the exit code."""
    if arguments.format not in FORMATS:
        raise ConfigError(
            f"format: {arguments.format!r} is not one of {', '.join(FORMATS)}{nearest(arguments.format, FORMATS)}"
        )
    if arguments.convention not in CONVENTIONS:
        raise ConfigError(f"convention: {arguments.convention!r} is not one of {', '.join(CONVENTIONS)}")
    if arguments.depth is not None and arguments.depth < 0:
        raise ConfigError(f"depth: {arguments.depth} is negative; 0 is the whole model, 1 its direct children")
    if arguments.compare:
        first, second = arguments.compare
        reports = [_configuration(first, arguments), _configuration(second, arguments)]
        if arguments.format not in ("table", "markdown", "csv", "json"):
            raise ConfigError(f"format: {arguments.format} does not compare; table, markdown, csv and json do")
        text = compare((first, second), (reports[0], reports[1]), arguments.format, arguments.depth)
        _write(text, arguments.output)
    else:
        given = {name: getattr(arguments, name) for name in PLAN_OPTIONS}
        title, report, subject = _count(arguments, arguments.model, given)
        examples = max(next((tensor.shape[0] for tensor in subject.example if tensor.ndim), 1), 1)
        groups = _groups(subject) if arguments.format == "html" and arguments.channels else None
        text = render(report, arguments.format, title, arguments.depth, groups)
        if arguments.method is not None:
            if arguments.format not in ("table", "markdown"):
                raise ConfigError(f"--method: {arguments.format} has no place for it; table and markdown do")
            text += "\n" + _training_lines(report, examples, arguments)
        _write(text, arguments.output)
        reports = [report]
    unknown = {name: operations for report in reports for name, operations in report.unknown.items()}
    if arguments.strict and unknown:
        listed = "; ".join(
            f"{', '.join(operations)} in {reports[0].places.get(name) or name}" for name, operations in unknown.items()
        )
        print(f"fxsparse: strict: operations without a rule: {listed}", file=sys.stderr)
        return STRICT_FAILURE
    return 0


def _groups(subject: Subject) -> ChannelGroups | str:
    """The groups of channels, or why they are not known: a cost can be counted where a capture fails."""
    try:
        return channel_groups(subject.model, subject.example)
    except FxSparseError as error:
        return f"no groups of channels: {error}"


def _count(
    arguments: argparse.Namespace, model: str | None, given: Mapping[str, Any]
) -> tuple[str, FlopReport, Subject]:
    """A title, the report of one configuration, and what was counted."""
    subject = make_subject(model, key_values(arguments.options, "--options"), arguments.input, arguments.checkpoint)
    plan = {name: value for name, value in given.items() if value is not None}
    if subject.active is not None:
        if "sparsity" in plan or "flops" in plan:
            raise ConfigError("--checkpoint has its own sparsity; leave out --sparsity and --flops")
        report = plan_flops(subject.model, subject.example).at(subject.active)
        title = f"{subject.name}, {arguments.checkpoint}"
    else:
        report = plan_flops(subject.model, subject.example, **plan)
        title = subject.name
        if "sparsity" in plan or "flops" in plan:
            asked = f"sparsity {plan['sparsity']:g}" if "sparsity" in plan else f"FLOPs {plan['flops']:g} of dense"
            title += f", {asked}, {plan.get('distribution', 'erk')}"
    return title, report.under(arguments.convention, tuple(arguments.also)), subject


def _configuration(text: str, arguments: argparse.Namespace) -> FlopReport:
    """`[MODEL,]KEY=VALUE,...`, over the flags that are given for both."""
    model, given = arguments.model, {name: getattr(arguments, name) for name in PLAN_OPTIONS}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            model = part
        elif key not in PLAN_OPTIONS:
            raise ConfigError(
                f"--compare {text!r}: {key!r} is not one of {', '.join(PLAN_OPTIONS)}{nearest(key, PLAN_OPTIONS)}"
            )
        else:
            try:
                given[key] = PLAN_OPTIONS[key](value)
            except ValueError as error:
                raise ConfigError(f"--compare {text!r}: {key} is {value!r}, not a number") from error
    return _count(arguments, model, given)[1]


def _training_lines(report: FlopReport, examples: int, arguments: argparse.Namespace) -> str:
    """The ledger: an average step of the method, and the run by its schedule where its length is given.

    Args:
        report: of a forward pass of `examples` examples.
    """
    name, interval = arguments.method, arguments.update_interval
    method = make_method(name)
    if method.changes_widths:
        raise ConfigError(f"--method: {name} is another, narrower network; count that one")
    UpdateSchedule(interval, 1.0, 0.3)  # refuses a bad interval
    cost = step_cost(report, arguments.exact_backward)
    step = {
        Need.NEVER: cost.sparse,
        Need.UPDATES: (interval * cost.sparse + cost.dense_gradient) / (interval + 1),
        Need.ALWAYS: cost.dense_gradient,
    }[method.dense_gradient if method.grows else Need.NEVER]
    step = cost.dense if name == "dense" else step
    backward = "exact backward" if arguments.exact_backward else "backward = 2 x forward"
    over = "at the final densities" if method.initial_sparsity(0.5) != 0.5 else "averaged over an update interval"
    lines = [
        f"training step, {name}, {over}: {2 * step / examples:,.0f} FLOPs an example; "
        f"{step / cost.dense:.4f} of dense ({backward})"
    ]
    if arguments.steps is not None:
        common = UpdateSchedule.for_run(
            arguments.steps, update_interval=interval, stop_fraction=0.75, drop_fraction=0.3, decay="cosine"
        )
        schedule = method.schedule(common, arguments.steps)
        sizes = {node.weight: node.elements for node in report.nodes if node.weight}
        targets = {node.weight: node.active for node in report.nodes if node.weight}
        counts = method.planned_counts(sizes, sizes if name == "dense" else targets, schedule, arguments.steps)
        run = training_cost(
            phases_of(report, counts, arguments.steps),
            method.dense_gradient_steps(schedule, arguments.steps),
            arguments.exact_backward,
        )
        lines.append(run.describe("planned", arguments.batch_size / examples))
    return "\n".join(lines)


def _write(text: str, output: str | None) -> None:
    if output is None:
        print(text)
        return
    try:
        Path(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"could not write {output}: {error.strerror}") from error
