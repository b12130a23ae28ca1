"""A picture of groups of channels: who makes them, and which weights read them."""

import shutil
import subprocess

from ..core.channel_records import ChannelGroup, Status
from ..core.errors import ConfigError

COLOURS: dict[Status, str] = {"exact": "#cfe8cf", "norm-coupled": "#fbe3b5", "pinned": "#e4e4e4"}
"""Fill colours by the best status among a group's atoms."""


def dot(groups: tuple[ChannelGroup, ...], title: str) -> str:
    """Graphviz source: a box a group, an arrow to the group that is made by a weight which reads it."""
    lines = [
        f"digraph {_quoted(title)} {{",
        "  rankdir=TB; nodesep=0.2; ranksep=0.3;",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=9, color="#9a9a9a"];',
        '  edge [color="#9a9a9a", arrowsize=0.5];',
    ]
    for group in groups:
        count = len(group.with_status(group.status))
        atoms = f"{len(group.atoms)} atoms" if count == len(group.atoms) else f"{count} of {len(group.atoms)} atoms"
        why = "" if group.status == "exact" else f"\\n{group.reasons[0]}"
        label = "\\n".join((*group.producers[:4], *(["..."] if len(group.producers) > 4 else [])))
        label = f"{label}\\n{atoms} {group.status}{why}"
        lines.append(f"  {_quoted(group.name)} [label={_quoted(label)}, fillcolor={_quoted(COLOURS[group.status])}];")
    for name, sources in links(groups):
        lines += [f"  {_quoted(source)} -> {_quoted(name)};" for source in sources]
    return "\n".join([*lines, "}", ""])


def links(groups: tuple[ChannelGroup, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """A group's name and those that a weight which makes it reads, itself too where a stream feeds on itself."""
    makers = {producer: group.name for group in groups for producer in group.producers}
    sources: dict[str, dict[str, None]] = {group.name: {} for group in groups}
    for group in groups:
        for reader in dict.fromkeys(item.tensor for atom in group.atoms for item in atom.of("consumer")):
            if reader in makers:
                sources[makers[reader]][group.name] = None
    return [(name, tuple(found)) for name, found in sources.items()]


def drawn(source: str) -> str:
    """The SVG that Graphviz makes of its source.

    Raises:
        ConfigError: Graphviz is not installed, or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise ConfigError("svg needs Graphviz, whose program `dot` is not on the PATH; install it, or take dot()")
    done = subprocess.run([program, "-Tsvg"], input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"Graphviz failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _quoted(text: str) -> str:
    return '"' + text.replace('"', r"\"") + '"'
