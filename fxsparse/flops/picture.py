"""The graph of a report: as Graphviz source, as SVG, and with positions for the page."""

import shutil
import subprocess
from collections.abc import Sequence
from math import sqrt

from ..core.errors import ConfigError
from .flop_report import FlopReport
from .tables import costs

PALETTE = ("#fde0c5", "#facba6", "#f8b58b", "#f59e72", "#f2855d", "#ef6a4c", "#eb4a40")
"""Fill colours from empty to dense."""


def colour(density: float) -> str:
    """The fill of a node by its weight's density."""
    return PALETTE[min(int(density * len(PALETTE)), len(PALETTE) - 1)]


def dot(report: FlopReport, title: str = "model") -> str:
    """The graph for Graphviz: nodes coloured by density, sized by their share of the sparse cost."""
    sparse, dense = costs(report)
    largest = max(sparse.values(), default=0) or 1
    nodes = {node.node: node for node in report.nodes}
    lines = [
        f"digraph {_quoted(title)} {{",
        "  rankdir=TB; nodesep=0.15; ranksep=0.25;",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=9, color="#9a9a9a"];',
        '  edge [color="#9a9a9a", arrowsize=0.5];',
    ]
    for name, _ in report.links:
        node = nodes.get(name)
        if node is None or not dense[name]:
            label = node.operation if node else name
            lines.append(f'  {_quoted(name)} [label={_quoted(label)}, fillcolor="#f4f4f4", height=0.2, width=0.4];')
            continue
        side = 0.35 + 1.6 * sqrt(sparse[name] / largest)
        density = f"\\ndensity {node.density:.3f}" if node.elements else ""
        label = f"{node.module or name}\\n{node.operation}{density}\\n{sparse[name]:,.0f}"
        fill = colour(node.density) if node.elements else "#cfe3f3"
        lines.append(
            f'  {_quoted(name)} [label={_quoted(label)}, fillcolor="{fill}", width={2 * side:.2f}, height={side:.2f}];'
        )
    lines += [f"  {_quoted(source)} -> {_quoted(name)};" for name, sources in report.links for source in sources]
    return "\n".join([*lines, "}", ""])


def svg(report: FlopReport, title: str = "model") -> str:
    """The graph drawn by Graphviz.

    Raises:
        ConfigError: Graphviz is not installed, or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise ConfigError(
            "format svg needs Graphviz, whose program `dot` is not on the PATH; install Graphviz, or choose format "
            "dot (its source) or html (which draws the graph itself)"
        )
    done = subprocess.run([program, "-Tsvg"], input=dot(report, title), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"Graphviz failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}"
        )
    return done.stdout


def _quoted(text: str) -> str:
    return '"' + text.replace('"', r"\"") + '"'


def layers(links: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[float, int]]:
    """Name -> (column, row): rows by the longest way from an input, columns kept near the neighbours'.

    Args:
        links: a name and those before it, in order; ones that come later in the order do not count.
    """
    rank: dict[str, int] = {}
    for name, sources in links:
        rank[name] = 1 + max((rank[source] for source in sources if source in rank), default=-1)
    column: dict[str, float] = {}
    taken: dict[int, list[float]] = {}
    for name, sources in links:
        above = [column[source] for source in sources if source in column]
        wanted = sum(above) / len(above) if above else 0.0
        used = taken.setdefault(rank[name], [])
        offsets = (side * step / 2 for step in range(4 * len(used) + 3) for side in (1, -1))
        column[name] = next(wanted + o for o in offsets if all(abs(wanted + o - other) >= 1 for other in used))
        used.append(column[name])
    return {name: (column[name], rank[name]) for name, _ in links}
