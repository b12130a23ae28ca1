"""Every form of a report, by name."""

from collections.abc import Callable

from ..core.errors import ConfigError, nearest
from . import page, picture, tables
from .flop_report import FlopReport

FORMATS: dict[str, Callable[[FlopReport, str, int | None], str]] = {
    "table": lambda report, title, depth: tables.table(report, depth),
    "markdown": lambda report, title, depth: f"## {title}\n\n{tables.table(report, depth, 'github')}",
    "json": lambda report, title, depth: report.to_json(),
    "csv": lambda report, title, depth: tables.comma_separated(report, depth).rstrip("\n"),
    "dot": lambda report, title, depth: picture.dot(report, title).rstrip("\n"),
    "svg": lambda report, title, depth: picture.svg(report, title).rstrip("\n"),
    "html": lambda report, title, depth: page.page(report, title).rstrip("\n"),
}
"""Format -> `(report, title, depth)` to text without a line break at its end."""


def render(report: FlopReport, form: str, title: str = "model", depth: int | None = None) -> str:
    """The report in one of `FORMATS`.

    Raises:
        ConfigError: an unknown format, or `svg` without Graphviz.
    """
    if form not in FORMATS:
        raise ConfigError(f"format: {form!r} is not one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    return FORMATS[form](report, title, depth)
