"""`save_sparse` and `load_sparse`: modules in files that hold active weights and their places alone.

`lowering/sparse_file.py` has the format. Masked modules and those that train lowered read each other's files; modules
that were lowered for inference have their batch normalisation folded in, so their files are theirs alone.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .channels.channel_plan import channels_in
from .core.errors import CheckpointError, ConfigError, InputError
from .core.granularity import check_masks
from .core.packed_masks import is_packed, pack_mask, unpack_mask
from .core.records import TensorSpec, record_of, specs_of
from .core.sharded_tensors import refuse_sharded
from .kernels import SparsePattern
from .kernels.calls import fused_conv, fused_linear
from .kernels.stored_pattern import with_blocks
from .lowering import (
    LoweredModule,
    LoweredStorage,
    captured_by,
    check_trains_lowered,
    lower_for_inference,
)
from .lowering.named_tensors import assign, check_rest_is_there, names_of, off_meta
from .lowering.sparse_file import SparseFile, SparseFileWriter
from .passes.trace import split_example
from .runtime.lowered_site import Storage, pattern_of
from .sparse_module import SparseModule

LOWER = ("train", "inference")


def save_sparse(module: SparseModule | LoweredModule, path: str | Path) -> None:
    """Writes all parameters and buffers that `state_dict` has, of sparse weights the active values and the pattern.

    Args:
        module: masked, lowered for training, or lowered for inference.
        path: of the file, by custom `*.safetensors`.

    Raises:
        CheckpointError: the file cannot be written, or the module's state is more than tensors.
        ConfigError: another kind of module.
    """
    _check_module(module)
    refuse_sharded(module, "save_sparse")
    if isinstance(module, LoweredModule):
        _save_inference(module, path)
        return
    writer = SparseFileWriter("module", module._get_name())
    with module._at_compact_or_full_size():
        names = names_of(module)
        for site in module.sites:
            storage = module.lowered.get(site.name)
            weight = module.get_parameter(site.name).detach()
            if weight.is_meta:
                raise CheckpointError(f"{site.name} is on the meta device; there is nothing to save yet")
            if storage is not None:
                pattern = pattern_of(module, site.name, storage)
                order = pattern.indices().argsort()
                rows = pattern.starts, pattern.columns
                writer.add_site(site.name, weight[order], storage.shape, *rows, storage.block)
            else:
                mask = unpack_mask(module.get_buffer(site.mask_name), torch.Size(site.shape))
                mask = mask.cpu().reshape(site.shape[0], -1)
                starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
                values = weight.cpu().reshape(-1)[mask.reshape(-1)]
                writer.add_site(site.name, values, site.shape, starts, mask.nonzero()[:, 1])
        sites = {id(module.get_parameter(site.name)): site.name for site in module.sites}
        _add_rest(writer, _without_masks(module, names), sites)
    writer.write(path)


def _save_inference(module: LoweredModule, path: str | Path) -> None:
    writer = SparseFileWriter("inference", module._get_name())
    sites = {site.name: site for site in _fused_sites(module)}
    patterns = {part for site in sites.values() for part in (site.starts, site.columns)}
    for site in sites.values():
        starts, columns = module.get_buffer(site.starts), module.get_buffer(site.columns)
        order = _order(site.shape, site.block, starts, columns)
        writer.add_site(site.name, module.get_buffer(site.name)[order], site.shape, starts, columns, site.block)
    _add_rest(writer, {name: tensor for name, tensor in names_of(module).items() if name not in patterns | set(sites)})
    writer.write(path)


def load_sparse(
    module: Any,
    path: str | Path,
    lower: str | None = None,
    *,
    layers: str | Sequence[str] = "auto",
    example_input: Any = None,
) -> Any:
    """Reads what `save_sparse` wrote into a module of the same architecture.

    Weights that are lowered, or are going to be, are never dense on the way. So of a model that would not fit into
    memory dense: make it on the meta device, `sparsify` it, and load with `lower`.

    Args:
        module: masked, lowered for training, or lowered for inference. It may be on the meta device.
        path: of the file.
        lower: `"train"` lowers the masked module for training; `"inference"` returns a `LoweredModule` and leaves a
            module on the meta device as it is; None loads into what the module is.
        layers, example_input: as of `SparseModule.lower`.

    Returns:
        `module`; with `lower="inference"` the lowered one.

    Raises:
        CheckpointError: a file that is damaged or foreign, or does not belong to this module; nothing has changed then.
        ConfigError: another kind of module, or `lower`.
        RuntimeStateError: a method that does not train lowered.
    """
    _check_module(module)
    if lower is not None and lower not in LOWER:
        raise ConfigError(f"lower: {lower!r} is not one of: None, {', '.join(LOWER)}")
    file = SparseFile(path)
    if isinstance(module, LoweredModule):
        if lower is not None:
            raise ConfigError(f"lower: {lower!r} is for masked modules; this one is lowered for inference")
        return _load_inference(module, file)
    if file.kind != "module":
        raise CheckpointError(
            f"{path} is of a module that was lowered for inference, batch normalisation folded in; load it into such a "
            "module"
        )
    names = names_of(module)
    weights = {id(module.get_parameter(site.name)): site for site in module.sites}
    rest = {name: t for name, t in _without_masks(module, names).items() if id(t) not in weights}
    _check_file(file, {site.name: (site.shape, names[site.name].dtype) for site in module.sites}, rest)
    rows = {site.name: file.rows(site.name) for site in module.sites}
    check_rest_is_there(module)
    if module.channels is not None:
        channels_in(module.channels, module.sites, _masks_of(module, file, rows))
    if module.group_layouts:
        check_masks(_masks_of(module, file, rows), {}, module.group_layouts, module.granularity)
    target, fresh = module, None
    if lower is not None and not module.lowered and all(module.get_parameter(s.name).is_meta for s in module.sites):
        example = module.example if example_input is None else specs_of(split_example(example_input))
        if lower == "train":
            check_trains_lowered(module.method, module.semantics, module.channels)
        else:
            target = copy.deepcopy(module)
        active = {name: columns.numel() * file.sites[name].block for name, (_, columns) in rows.items()}
        fresh = target._plan_lowering(example, layers, lower == "train", active)
    storage = target._storage if fresh is None else fresh[0]
    _check_blocks(file, rows, storage)
    target.example = off_meta(target.example)
    with target._at_compact_or_full_size():
        _fill(target, file, rows, storage)
    if fresh is not None:
        target._take_storage(*fresh)
        if lower == "inference":
            return lower_for_inference(
                captured_by(target, target.example), fresh[0].decisions, layers, fresh[0].recurrences
            )
        return target
    if target._rewirer is not None:
        target._rewirer.patterns_loaded()
    if target.channels is not None:
        target.apply_masks_()
    if lower == "train" and not target.lowered:
        return target.lower(train=True, layers=layers, example_input=example_input)
    if lower == "inference":
        return target.lower(layers=layers, example_input=example_input)
    return target


# -- names ------------------------------------------------------------------------------------------------


def _check_module(module: Any) -> None:
    if not isinstance(module, (SparseModule, LoweredModule)):
        raise ConfigError(
            f"a {type(module).__name__} is not sparse; save_sparse and load_sparse take what sparsify or lower returns"
        )


def _without_masks(module: SparseModule, names: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {id(names[site.mask_name]) for site in module.sites if site.mask_name in names}
    return {name: tensor for name, tensor in names.items() if id(tensor) not in masks}


def _add_rest(writer: SparseFileWriter, names: dict[str, Tensor], known: dict[int, str] | None = None) -> None:
    first = dict(known or {})
    for name, tensor in names.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device; there is nothing to save yet")
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            if name not in (known or {}).values():
                writer.add(name, tensor)
        else:
            writer.add_alias(name, kept)


# -- modules lowered for inference ------------------------------------------------------------------------


@dataclass(frozen=True)
class _FusedSite:
    """The buffers of one sparse call of a `LoweredModule`; `name` is that of the values."""

    name: str
    starts: str
    columns: str
    shape: tuple[int, ...]
    block: int


def _fused_sites(module: LoweredModule) -> Iterator[_FusedSite]:
    for node in module.graphs["eval"].nodes:
        if node.target not in (fused_conv, fused_linear):
            continue
        x, values, (starts, columns) = node.args[:3]
        assert isinstance(x, fx.Node)
        if node.target is fused_linear:
            spec = record_of(x).spec
            assert isinstance(spec, TensorSpec), "annotated before it was fused"
            shape, block = (node.args[4], spec.shape[-1]), node.args[5]
        else:
            shape, block = tuple(node.args[5]), node.args[10]
        yield _FusedSite(str(values.target), str(starts.target), str(columns.target), shape, block)


def _order(shape: tuple[int, ...], block: int, starts: Tensor, columns: Tensor) -> Tensor:
    """Row by row, where the values of blocks stand."""
    return SparsePattern.of_rows(shape, 1, block, starts, columns).indices().argsort()


@torch.no_grad()
def _load_inference(module: LoweredModule, file: SparseFile) -> LoweredModule:
    if file.kind != "inference":
        raise CheckpointError(
            f"{file.path} is of a module that trains, and this one has batch normalisation folded in; load it into the "
            'masked module, with lower="inference"'
        )
    sites = {site.name: site for site in _fused_sites(module)}
    names = names_of(module)
    patterns = {part for site in sites.values() for part in (site.starts, site.columns)}
    rest = {name: tensor for name, tensor in names.items() if name not in patterns | set(sites)}
    _check_file(file, {name: (site.shape, names[name].dtype) for name, site in sites.items()}, rest)
    rows = {name: file.rows(name) for name in sites}
    for name, site in sites.items():
        try:
            rows[name] = with_blocks(rows[name], file.sites[name].block, site.block)
        except InputError as error:
            raise CheckpointError(f"{file.path}: {name}: {error}") from None
    for name, site in sites.items():
        starts, columns = rows[name]
        values = file.tensor(name)
        if site.block > 1:
            ordered = torch.empty_like(values)
            ordered[_order(site.shape, site.block, starts, columns)] = values
            values = ordered
        for buffer, tensor in ((name, values), (site.starts, starts.int()), (site.columns, columns.int())):
            owner, _, last = buffer.rpartition(".")
            module.get_submodule(owner)._buffers[last] = tensor
    _fill_rest(module, file, rest)
    return module


# -- loading ----------------------------------------------------------------------------------------------


def _check_file(
    file: SparseFile, sites: dict[str, tuple[tuple[int, ...], torch.dtype]], rest: dict[str, Tensor]
) -> None:
    """Refuses a file that does not belong to a module, before anything changes."""
    expected = sites | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in rest.items()}
    given = file.dense | set(file.sites) | set(file.aliases)
    missing, unexpected = sorted(set(expected) - given), sorted(given - set(expected) - _aliases_of(file, expected))
    for what, names in (("lacks", missing), ("has, unlike the module,", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{file.path} {what} {names[0]}{more}; it is of another model ({file.name})")
    for name in sites:
        if name not in file.sites:
            raise CheckpointError(f"{file.path} has {name} as a dense tensor, and it is masked in the module")
    for name, (shape, dtype) in expected.items():
        source = file.aliases.get(name, name)
        if name not in sites and source in file.sites:
            raise CheckpointError(f"{file.path} has {name} as a sparse weight, and it is not masked in the module")
        found_shape, found_dtype = file.spec(source)
        if found_shape != shape:
            raise CheckpointError(f"{file.path} has {name} with shape {found_shape}, the module {shape}")
        if found_dtype != dtype:
            raise CheckpointError(f"{file.path} has {name} as {found_dtype}, the module as {dtype}")


def _aliases_of(file: SparseFile, expected: dict[str, Any]) -> set[str]:
    """Other names of the file's tensors that the module needs not have."""
    return {alias for alias, name in file.aliases.items() if name in expected and name in file.sites}


def _masks_of(module: SparseModule, file: SparseFile, rows: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    masks = {}
    for site in module.sites:
        starts, columns = with_blocks(rows[site.name], file.sites[site.name].block, 1)
        masks[site.name] = SparsePattern.of_rows(site.shape, 1, 1, starts, columns).mask()
    return masks


def _check_blocks(file: SparseFile, rows: dict[str, tuple[Tensor, Tensor]], storage: LoweredStorage | None) -> None:
    """Refuses single weights where blocks share a pattern."""
    if storage is None:
        return
    for name, stored in storage.planned.items():
        try:
            with_blocks(rows[name], file.sites[name].block, stored.block)
        except InputError as error:
            raise CheckpointError(f"{file.path}: {name}: {error}") from None


@torch.no_grad()
def _fill(
    module: SparseModule, file: SparseFile, rows: dict[str, tuple[Tensor, Tensor]], storage: LoweredStorage | None
) -> None:
    weights = {id(module.get_parameter(site.name)) for site in module.sites}
    rest = {name: t for name, t in _without_masks(module, names_of(module)).items() if id(t) not in weights}
    for site in module.sites:
        starts, columns = rows.pop(site.name)
        before = file.sites[site.name].block
        if storage is not None and site.name in storage.planned:
            _install(module, storage, site.name, storage.planned[site.name], file, (starts, columns))
            continue
        starts, columns = with_blocks((starts, columns), before, 1)
        at = SparsePattern.of_rows(site.shape, 1, 1, starts, columns).indices()
        weight, mask = module.get_parameter(site.name), module.get_buffer(site.mask_name)
        dense = torch.zeros(site.shape, dtype=weight.dtype)
        dense.view(-1)[at] = file.tensor(site.name)
        kept = torch.zeros(site.shape, dtype=torch.bool)
        kept.view(-1)[at] = True
        assign(module, [site.name, *site.aliases], dense)
        kept = pack_mask(kept) if is_packed(mask) else kept
        assign(module, [name for name, t in module.named_buffers(remove_duplicate=False) if t is mask], kept)
    _fill_rest(module, file, rest)


def _install(
    module: SparseModule,
    storage: LoweredStorage,
    name: str,
    stored: Storage,
    file: SparseFile,
    rows: tuple[Tensor, Tensor],
) -> None:
    starts, columns = with_blocks(rows, file.sites[name].block, stored.block)
    pattern = SparsePattern.of_rows(stored.shape, stored.groups, stored.block, starts, columns)
    values = file.tensor(name)
    if stored.block > 1:
        ordered = torch.empty_like(values)
        ordered[pattern.indices().argsort()] = values
        values = ordered
    storage.install(module, name, values, pattern)


def _fill_rest(module: nn.Module, file: SparseFile, rest: dict[str, Tensor]) -> None:
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in rest.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    for names in by_tensor.values():
        assign(module, names, file.tensor(file.aliases.get(names[0], names[0])))
