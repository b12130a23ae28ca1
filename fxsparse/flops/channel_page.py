"""The groups of channels for the page: a table, and a picture with positions."""

from typing import Any

from ..channels.channel_groups import HEADER, ChannelGroups
from ..channels.picture import COLOURS, links
from .picture import layers


def channel_data(groups: ChannelGroups | str) -> dict[str, Any]:
    """What the page shows of the groups; of a text, which says why there are none, the text."""
    if isinstance(groups, str):
        return {"summary": groups, "columns": [], "rows": [], "graph": []}
    return {
        "summary": groups.summary(),
        "columns": list(HEADER),
        "rows": groups.rows(),
        "graph": _graph(groups),
    }


def _graph(groups: ChannelGroups) -> list[dict[str, Any]]:
    arrows = links(groups.groups)
    places = layers(arrows)
    drawn = []
    for group, (name, sources) in zip(groups.groups, arrows, strict=True):
        x, y = places[name]
        shown = ".".join(name.split(".")[-4:-1]) or name
        more = f" +{len(group.producers) - 1}" if len(group.producers) > 1 else ""
        label = f"{shown}{more}: {len(group.atoms)}"
        counts = [f"{len(group.with_status(status))} atoms {status}" for status in COLOURS if group.with_status(status)]
        tip = ["made by", *(f"  {producer}" for producer in group.producers[:12])]
        tip += [f"  and {len(group.producers) - 12} more"] * (len(group.producers) > 12)
        tip += [*counts, *(f"because of {reason}" for reason in group.reasons[:3])]
        drawn.append(
            {
                "name": name,
                "label": label,
                "tip": "\n".join(tip),
                "width": 7 * len(label) + 12,
                "fill": COLOURS[group.status],
                "x": x,
                "y": y,
                "from": list(sources),
            }
        )
    return drawn
