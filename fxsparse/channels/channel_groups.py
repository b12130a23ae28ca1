"""`ChannelGroups`: the result of the analysis, as data, a table, JSON and a picture."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tabulate import tabulate

from ..core.channel_records import Atom, ChannelGroup, ChannelSlice
from .picture import dot, drawn

HEADER = ("group", "atoms", "exact", "norm-coupled", "pinned", "channels an atom", "consumers", "why")


@dataclass(frozen=True)
class ChannelGroups:
    """Groups of channels of one model.

    Attributes:
        model: its class name.
        groups: all of them, in execution order.
    """

    model: str
    groups: tuple[ChannelGroup, ...]

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups with an atom that is not pinned."""
        return tuple(group for group in self.groups if group.status != "pinned")

    @property
    def pinned(self) -> tuple[ChannelGroup, ...]:
        """The groups that stay as they are."""
        return tuple(group for group in self.groups if group.status == "pinned")

    def atoms(self) -> Iterator[Atom]:
        for group in self.groups:
            yield from group.atoms

    def group_of(self, producer: str) -> ChannelGroup:
        """The group whose channels a weight makes.

        Raises:
            KeyError: no group has this producer.
        """
        for group in self.groups:
            if producer in group.producers:
                return group
        raise KeyError(f"{producer} makes the channels of no group")

    def rows(self) -> list[list[str | int]]:
        """A row a group, under `HEADER`: how many atoms, of which kind, what they consist of, why some have to stay."""
        return [
            [
                group.name if len(group.producers) == 1 else f"{group.name} and {len(group.producers) - 1} more",
                len(group.atoms),
                *(len(group.with_status(status)) for status in ("exact", "norm-coupled", "pinned")),
                sum(len(item.indices) for item in group.atoms[0].of("producer")),
                len({item.tensor for atom in group.atoms for item in atom.of("consumer")}),
                "; ".join(group.reasons[:2]),
            ]
            for group in self.groups
        ]

    def summary(self) -> str:
        return f"{self.model}: {len(self.free)} groups of channels, {len(self.pinned)} more that stay whole"

    def table(self) -> str:
        """`rows` as text, with the summary below."""
        return f"{tabulate(self.rows(), HEADER)}\n{self.summary()}"

    def dot(self) -> str:
        """The groups as Graphviz source: boxes coloured by status, arrows from a group to those made of it."""
        return dot(self.groups, self.model)

    def svg(self) -> str:
        """The same, drawn by Graphviz.

        Raises:
            ConfigError: Graphviz is not installed, or fails.
        """
        return drawn(self.dot())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChannelGroups":
        """What `to_json` wrote."""
        data = json.loads(text)

        def atom(item: dict) -> Atom:
            slices = [ChannelSlice(s["tensor"], s["dim"], tuple(s["indices"]), s["role"]) for s in item["slices"]]
            return Atom(item["id"], item["status"], item["reason"], tuple(slices))

        groups = [
            ChannelGroup(tuple(group["producers"]), tuple(atom(item) for item in group["atoms"]))
            for group in data["groups"]
        ]
        return cls(data["model"], tuple(groups))
