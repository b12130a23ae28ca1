"""`CompactModule`: what `compact` gives, a captured module that is saved as a plain `torch.fx.GraphModule`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..captured_module import CapturedModule
from ..core.errors import CaptureError
from ..core.records import Captured


class CompactModule(CapturedModule):
    """Ordinary, smaller layers under the keys of the model that they were cut from.

    Saved by `torch.save` (or pickled) it is a plain `torch.fx.GraphModule` of `nn.Conv2d`, `nn.Linear` and the like,
    which loads and runs where fxsparse is not installed. Where the two modes differ in their graphs, or a graph holds
    what fx cannot save, it is saved as what it is; `graph_module()` then gives one mode's, or says what is in the way.

    Attributes:
        kept: name of every parameter and buffer that was cut -> per dimension the indices that are left, in order;
            None where all are.
    """

    kept: Mapping[str, list[Tensor | None]]

    def __init__(self, captured: Captured, kept: Mapping[str, list[Tensor | None]] | None = None) -> None:
        super().__init__(captured)
        self.kept = dict(kept or {})

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if self.graphs["train"] is not self.graphs["eval"] or any(self.flags.values()):
            return super().__reduce_ex__(protocol)
        try:
            plain = self.graph_module(share=True)
        except CaptureError:
            return super().__reduce_ex__(protocol)
        load, arguments = plain.__reduce__()
        # fx loads what the graph mentions, in that order; the state puts all of it back in the model's.
        return load, arguments, {key: plain.__dict__[key] for key in ("_parameters", "_buffers", "_modules")}
