"""Every form of a report, by name."""

from collections.abc import Callable

from ..channels.channel_groups import ChannelGroups
from ..core.errors import ConfigError, nearest
from . import page, picture, tables
from .flop_report import FlopReport

FORMATS: dict[str, Callable[[FlopReport, str, int | None, ChannelGroups | str | None], str]] = {
    "table": lambda report, title, depth, groups: tables.table(report, depth),
    "markdown": lambda report, title, depth, groups: f"## {title}\n\n{tables.table(report, depth, 'github')}",
    "json": lambda report, title, depth, groups: report.to_json(),
    "csv": lambda report, title, depth, groups: tables.comma_separated(report, depth).rstrip("\n"),
    "dot": lambda report, title, depth, groups: picture.dot(report, title).rstrip("\n"),
    "svg": lambda report, title, depth, groups: picture.svg(report, title).rstrip("\n"),
    "html": lambda report, title, depth, groups: page.page(report, title, groups).rstrip("\n"),
}
"""Format -> `(report, title, depth, groups)` to text without a line break at its end."""


def render(
    report: FlopReport,
    form: str,
    title: str = "model",
    depth: int | None = None,
    groups: ChannelGroups | str | None = None,
) -> str:
    """The report in one of `FORMATS`; the page shows the groups of channels too, or why there are none.

    Raises:
        ConfigError: an unknown format, or `svg` without Graphviz.
    """
    if form not in FORMATS:
        raise ConfigError(f"format: {form!r} is not one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    return FORMATS[form](report, title, depth, groups)
