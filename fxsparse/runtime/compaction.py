"""Training at the compact size: the same parameters and the same optimizer, with inactive channels cut out.

Between two rewirings the module runs the graph that `compact` would give it, on parameters, buffers and optimizer
state that hold the active channels alone. For an update step it takes its full size again: everything that was cut
away is 0 by definition (statistics of batch normalisation are those of a new channel), so nothing has to be kept.
`Parameter` objects stay what they are, with other data, and so the user's optimizer, which holds them, goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.channel_labels import LabelSource
from ..core.channel_sites import FRESH_STATISTICS, ON_WEIGHTS, Alive, ChannelSite
from ..core.errors import RuntimeStateError
from ..core.labelled_model import LabelledModel
from ..core.masking import apply_mask
from ..passes.compact_channels import Removal, plan_removal, set_sizes
from ..passes.rewrite_channels import Box, cut
from .resizing import resize_parameter


class Compaction:
    """Makes a module small, and large again.

    Attributes:
        is_small: whether inactive channels are cut out now.
    """

    def __init__(
        self,
        module: Any,
        optimizer: torch.optim.Optimizer,
        labelled: LabelledModel,
        sites: Sequence[ChannelSite],
    ) -> None:
        """`labelled` is `module` itself with channel labels, at its full size.

        Raises:
            RuntimeStateError: where other processes hold replicas, whose tensors would have to change along.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise RuntimeStateError("training at the compact size is for one process; leave compact=True out")
        self.is_small = False
        self._module = module
        self._optimizer = optimizer
        self._labelled = labelled
        self._labels = {site.name: _labels_of(labelled, site) for site in sites}
        self._masks = {site.name: site.mask_name for site in module.sites}
        self._full_graphs: dict[str, fx.Graph] = dict(module.graphs)
        self._full_shapes: dict[str, torch.Size] = {}
        self._formats: dict[str, torch.memory_format] = {}
        self._boxes: dict[str, Box] = {}
        self._groups = {
            f"{path}.weight": inner.groups
            for path, inner in module.named_modules()
            if isinstance(inner, nn.modules.conv._ConvNd)
        }

    # -- resizing -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def shrink(self, alive: Alive) -> None:
        """Cuts out the channels that are not alive, as far as the graph can be written without them."""
        if self.is_small:
            return
        gone = torch.zeros_like(self._labelled.space.stays)
        for name, labels in self._labels.items():
            gone[labels[~alive[name]]] = True
        removal = plan_removal(self._labelled, gone)
        boxes = dict(removal.kept)
        boxes |= {self._masks[name]: box for name, box in removal.kept.items() if name in self._masks}
        module = self._module
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self._boxes = {name: box for name, box in boxes.items() if name in tensors}
        self._full_shapes = {name: tensors[name].shape for name in self._boxes}
        self._formats = {name: _format_of(tensors[name]) for name in self._boxes}
        for name, box in self._boxes.items():
            self._replace(name, lambda tensor, box=box: _cut(tensor, box))
        set_sizes(module, removal.groups, removal.indices)
        self._run(self._without_full_masks(removal))
        self.is_small = True

    @torch.no_grad()
    def expand(self) -> None:
        """Puts everything back in its place among zeros."""
        if not self.is_small:
            return
        for name in self._boxes:
            fill = FRESH_STATISTICS.get(name.rpartition(".")[2], 0.0)
            self._replace(name, lambda tensor, name=name, fill=fill: self._full(name, tensor, fill))
        set_sizes(self._module, self._groups, {})
        self._run(self._full_graphs)
        self.is_small = False

    def _full(self, name: str, tensor: Tensor, fill: float = 0.0) -> Tensor:
        layout = _format_of(tensor)  # the user may have changed it
        layout = self._formats[name] if layout == torch.contiguous_format else layout
        return _put(tensor, self._boxes[name], self._full_shapes[name], fill, layout)

    def _run(self, graphs: Mapping[str, fx.Graph]) -> None:
        self._module.set_graphs(graphs)

    def _replace(self, name: str, change: Any) -> None:
        """Changes a tensor of the module, and the optimizer's state of its shape."""
        owner, _, last = name.rpartition(".")
        holder = self._module.get_submodule(owner)
        parameter = holder._parameters.get(last)
        if parameter is None:
            holder._buffers[last] = change(holder._buffers[last])
            return
        resize_parameter(parameter, name, self._optimizer, change, "train without compact=True")

    def _without_full_masks(self, removal: Removal) -> dict[str, fx.Graph]:
        """The small graphs without the masks that have nothing left to mask."""
        full = {name for name, mask in self._masks.items() if bool(self._module.get_buffer(mask).all())}
        for graph in {id(graph): graph for graph in removal.graphs.values()}.values():
            for node in graph.find_nodes(op="call_function", target=apply_mask):
                weight, mask, gate = node.args
                if weight.target in full:
                    node.replace_all_uses_with(weight)
                    graph.erase_node(node)
                    for source in (mask, gate):
                        if not source.users:
                            graph.erase_node(source)
        return removal.graphs

    # -- saving and loading -------------------------------------------------------------------------------

    def hooks(self) -> list:
        """Lets the optimizer's `state_dict` and `load_state_dict` speak of the full size."""
        optimizer = self._optimizer
        return [
            optimizer.register_state_dict_post_hook(self._full_state),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: self.expand()),
        ]

    def _full_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self.is_small:
            return state_dict
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        full = dict(state_dict["state"])
        for key, parameter in zip(keys, held, strict=True):
            name = names.get(id(parameter), "")
            if name in self._boxes and key in full:
                full[key] = {
                    label: self._full(name, state)
                    if isinstance(state, Tensor) and state.shape == parameter.shape
                    else state
                    for label, state in full[key].items()
                }
        return {**state_dict, "state": full}


def _labels_of(labelled: LabelledModel, site: ChannelSite) -> Tensor:
    """The label of every atom of a site."""
    labels = torch.zeros(site.size, dtype=torch.int64)
    for item in site.of(*ON_WEIGHTS)[:1]:
        source = LabelSource(item.tensor, item.dim)
        own = labelled.space.labels(source, labelled.space.blocks[source][1])
        labels[list(item.atoms)] = own[list(item.positions)]
    return labels


def _cut(tensor: Tensor, box: Box) -> Tensor:
    """`cut` in the tensor's own memory format."""
    part = cut(tensor, box)
    return torch.empty_like(part, memory_format=_format_of(tensor)).copy_(part)


def _put(tensor: Tensor, box: Box, shape: torch.Size, fill: float, layout: torch.memory_format) -> Tensor:
    """The tensor of `shape` that `_cut` with `box` makes `tensor` of, with `fill` elsewhere."""
    full = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    full.fill_(bool(fill) if tensor.dtype == torch.bool else fill)
    index = []
    for dim, (kept, length) in enumerate(zip(box, shape, strict=True)):
        along = torch.arange(length) if kept is None else kept
        index.append(along.to(tensor.device).view([-1 if other == dim else 1 for other in range(len(shape))]))
    full[tuple(index)] = tensor
    return full


def _format_of(tensor: Tensor) -> torch.memory_format:
    """The memory format that the strides tell; contiguous where they leave it open."""
    for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return layout
    return torch.contiguous_format
