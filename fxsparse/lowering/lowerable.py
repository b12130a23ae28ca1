"""`LowerableModule`: what a masked module can do about being stored and run as its active weights alone."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import fx

from ..captured_module import CapturedModule
from ..core.channel_sites import ChannelPlan
from ..core.errors import ConfigError
from ..core.granularity import Granularity
from ..core.mask_storage import bool_masks, unpack_masks
from ..core.records import WeightSite, specs_of
from ..core.sharded_tensors import refuse_sharded
from ..passes.lower_recurrent import SparseRecurrence
from ..passes.trace import split_example
from ..runtime.lowered_site import Storage
from ..runtime.methods import Method
from ..runtime.semantics import Semantics
from .checks import check_follows, check_lowered, check_trains_lowered
from .decisions import Decision, captured_by, decide, kernel_block
from .inference import LoweredModule, lower_for_inference
from .present_example import present_example
from .recurrences import decide_recurrences
from .semi_structured import TOLERANCE, like, lower_for_cuda
from .storage import LoweredStorage

BACKENDS = ("cpu", "cuda")


class LowerableModule(CapturedModule):
    """The part of `SparseModule` that lowers it.

    Attributes:
        lowered_run: under which number lowered calls remember what a dense gradient is made of.
    """

    sites: tuple[WeightSite, ...]
    method: Method
    semantics: Semantics
    granularity: Granularity
    channels: ChannelPlan | None
    lowered_run: int
    _rewirer: Any
    _storage: LoweredStorage | None

    def apply_masks_(self) -> None:
        """Sets every inactive weight to exactly 0 in storage."""
        raise NotImplementedError

    @property
    def active_counts(self) -> dict[str, int]:
        """Weight name -> number of active weights."""
        raise NotImplementedError

    @property
    def lowered(self) -> Mapping[str, Storage]:
        """Weight name -> how it is stored, of the weights that are stored as their active values alone."""
        return {} if self._storage is None else self._storage.weights

    @property
    def lowering_decisions(self) -> tuple[Decision, ...]:
        """What `lower(train=True)` decided on every site, with the estimates; empty where it was not called."""
        return () if self._storage is None else self._storage.decisions

    def lower(
        self,
        backend: str = "cpu",
        train: bool = False,
        *,
        example_input: Any = None,
        layers: str | Sequence[str] = "auto",
        verify: bool = True,
    ) -> Any:
        """Has masked layers compute with their active weights alone, on sparse kernels.

        For inference: a copy that only runs, with batch normalisation folded in; one-layer `nn.GRU`s are lowered as
        well, and an embedding that one reads is multiplied with its weight beforehand. With `train`, before or during
        training: this module itself. Parameters, gradients and the optimizer's state of its lowered weights then hold
        active weights alone; `state_dict` still speaks of dense ones. `raise_()` is the way back. Build the optimizer
        afterwards, or attach it before: an attached one goes on, its state moved along.

        With `backend="cuda"`, for inference: a copy in which linears, and 1x1 convolutions as linears, whose masks are
        2:4 along the input dimension run on PyTorch's semi-structured kernels, in float16 or bfloat16.

        Args:
            backend: `"cpu"`, or `"cuda"`.
            train: whether to train; on the CPU.
            example_input: as for `sparsify`: with the batch size that counts; by default the example of the
                capture, in the dtype that the module has now.
            layers: `"auto"`, which leaves dense what the cost model finds faster dense; `"all"`; or globs of weights.
                For `"cuda"` there is no cost model: `"auto"` is `"all"`.
            verify: whether to compare outputs with the masked module's (for inference).

        Returns:
            A `LoweredModule`, or with `train` this module.

        Raises:
            ConfigError: another backend, `layers` that is none of these, or no device with such kernels.
            RuntimeStateError: a method or optimizer that needs dense weights; training at the compact size.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"backend: {backend!r} is not one of: {', '.join(BACKENDS)}")
        refuse_sharded(self, "lower")
        graphs = self.graphs if self._storage is None else self._storage.masked_graphs
        own_example = present_example(self.example, self, graphs["eval"])
        example = own_example if example_input is None else specs_of(split_example(example_input))
        if backend == "cuda":
            return self._lower_for_cuda(example, train, layers, verify)
        if train:
            self._lower_for_training(example, layers)
            return self
        own = copy.deepcopy(self).raise_()
        unpack_masks(own, own.sites)
        own.apply_masks_()  # of layers that stay dense, the stored zeros are all that masks them from here on
        own._lower(example, layers, False, None)
        assert own._storage is not None
        storage = own._storage
        lowered = lower_for_inference(captured_by(own, example), storage.decisions, layers, storage.recurrences)
        if verify and not any(parameter.is_meta for parameter in self.parameters()):
            tolerance = TOLERANCE.get(self.get_parameter(self.sites[0].name).dtype, 1e-3)
            check_lowered(self._get_name(), self, lowered, own_example, tolerance)
        return lowered

    def _lower_for_cuda(self, example: tuple, train: bool, layers: str | Sequence[str], verify: bool) -> LoweredModule:
        if train:
            raise ConfigError(
                "backend 'cuda': training on sparse kernels is for the CPU; on a GPU, train the masked module"
            )
        lowered = lower_for_cuda(self, example, layers)
        weight = self.get_parameter(self.sites[0].name)
        if verify and not weight.is_meta:
            tolerance = TOLERANCE.get(weight.dtype, 1e-3)
            check_lowered(self._get_name(), self, lowered, like(self.example, weight), tolerance)
        return lowered

    def raise_(self) -> Self:
        """Undoes `lower(train=True)`: dense parameters and masks again; returns this module."""
        if self._storage is not None:
            graphs = self._storage.masked_graphs
            self._storage.restore(self, self._optimizer)
            self._storage = None
            self.set_graphs(graphs)
            if self._rewirer is not None:
                self._rewirer.storage_changed()
        return self

    def _lower_for_training(self, example: tuple, layers: str | Sequence[str]) -> None:
        semantics = self.semantics if self._rewirer is None else self._rewirer.semantics
        check_trains_lowered(self.method, semantics, self.channels)
        if self._rewirer is not None:
            check_follows(self._rewirer.optimizer, self.method, bool(self._rewirer.update_count))
        self.raise_()
        self._lower(example, layers, True, self._optimizer)
        if self._rewirer is not None:
            self._rewirer.storage_changed()

    def _check_lowered_training(self, optimizer: torch.optim.Optimizer, semantics: Semantics) -> None:
        """Refuses what lowered weights cannot be trained with, as they are attached to an optimizer."""
        if self.lowered:
            check_trains_lowered(self.method, semantics, self.channels)
            check_follows(optimizer, self.method)

    def _lower(
        self, example: tuple, layers: str | Sequence[str], train: bool, optimizer: torch.optim.Optimizer | None
    ) -> None:
        storage, graphs = self._plan_lowering(example, layers, train, self.active_counts)
        storage.check(self, optimizer)
        unpack_masks(self, self.sites)
        storage.store(self, optimizer)
        self._take_storage(storage, graphs)

    def _plan_lowering(
        self, example: tuple, layers: str | Sequence[str], train: bool, active: Mapping[str, int]
    ) -> tuple[LoweredStorage, dict[str, fx.Graph]]:
        """How weights would be stored, and the graphs that then run; the module may be on the meta device."""
        blocks = {site.name: kernel_block(site, self.granularity) for site in self.sites}
        captured = captured_by(self, example)
        decisions, calls = decide(captured, self.sites, active, blocks, layers, train)
        recurrences: Sequence[SparseRecurrence] = ()
        if not train:
            decisions, recurrences = decide_recurrences(captured, self.sites, decisions, layers)
        shapes = {site.name: site.shape for site in self.sites}
        planned = {name: Storage(shapes[name], blocks[name], tuple(found)) for name, found in calls.items()}
        storage = LoweredStorage(decisions, planned, self.graphs, recurrences)
        return storage, storage.lowered_graphs(captured, train)

    def _take_storage(self, storage: LoweredStorage, graphs: Mapping[str, fx.Graph]) -> None:
        self._storage = storage
        self.set_graphs(graphs)

    # -- stored otherwise for a while ---------------------------------------------------------------------

    @contextmanager
    def _at_full_size(self) -> Iterator[None]:
        """All parameters and masks dense, and at their full size, for a while."""
        with ExitStack() as stack:
            stack.enter_context(self._at_compact_or_full_size())
            if self._storage is not None:
                stack.enter_context(self._storage.at_full_size(self, self._optimizer))
            stack.enter_context(bool_masks(self, self.sites))
            yield

    def _at_compact_or_full_size(self) -> AbstractContextManager[None]:
        return nullcontext() if self._rewirer is None else self._rewirer.at_full_size()

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._rewirer is None else self._rewirer.optimizer


def lower(sparse: LowerableModule, backend: str = "cpu", train: bool = False, **options: Any) -> Any:
    """`sparse.lower(backend, train, **options)`: a masked module computes with its active weights alone."""
    if isinstance(sparse, LoweredModule):
        return sparse.lower()
    if not isinstance(sparse, LowerableModule):
        raise ConfigError(f"a {type(sparse).__name__} has no masks; lower what sparsify returns")
    return sparse.lower(backend, train, **options)
