"""`FlopReport`: the counts of a forward pass, with the forms in which people and programs read them."""

import json
from typing import Any

from .flop_counts import FlopCounts
from .tables import plain, table


class FlopReport(FlopCounts):
    """The cost of one forward pass of the example. See `FlopCounts` for what the numbers are."""

    def table(self, depth: int | None = None, style: str = "simple") -> str:
        """The convention, the layers grouped by module, and the totals, for a terminal.

        Args:
            depth: how many levels of modules to tell apart; None lists every layer.
            style: a format of `tabulate`, such as `"simple"` or `"github"`.
        """
        return table(self, depth, style)

    def to_dict(self) -> dict[str, Any]:
        """Convention, totals and nodes as plain values."""
        return plain(self)

    def to_json(self) -> str:
        """Convention, totals and nodes as a JSON object."""
        return json.dumps(self.to_dict(), indent=1)
