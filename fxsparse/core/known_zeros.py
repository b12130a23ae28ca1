"""Which weights, and which gradients, are known to be 0 already wherever their mask is False.

Such a weight need not be multiplied by its mask, such a gradient not be masked again before the optimizer reads it.

Whoever writes such zeros says so here; what is known is forgotten by itself as soon as anybody writes to the weight or
to the mask, which the version counters of tensors tell. They do not tell of writes through `.data`, by NumPy, by fused
optimizers and by `torch.distributed`; who knows of one forgets (`forget_zeros`).
"""

import weakref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

_known: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=WeakIdRef)  # mask -> the weight, and both as they were

_masked: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=WeakIdRef)  # mask -> memory of a gradient, and its version


def _state(weight: Tensor, mask: Tensor) -> tuple[int, int, int, int]:
    return weight._version, weight.data_ptr(), mask._version, mask.data_ptr()


def note_zeros(weight: Tensor, mask: Tensor) -> None:
    """`weight` is 0 where `mask` (bool, the same shape) is False."""
    if type(mask) is not Tensor or mask.is_meta:  # fake ones have no memory
        return
    if not (weight.is_inference() or mask.is_inference()):  # these have no version
        _known[mask] = weakref.ref(weight), _state(weight, mask)


def forget_zeros(mask: Tensor) -> None:
    """Somebody is about to write to the weight, perhaps in a way that no version counter tells."""
    _known.pop(mask, None)


def has_zeros(weight: Tensor, mask: Tensor) -> bool:
    """Whether `note_zeros` was told so of these very tensors, and neither was written to since."""
    known = _known.get(mask)
    return known is not None and known[0]() is weight and known[1] == _state(weight, mask)


def note_masked(gradient: Tensor, mask: Tensor) -> None:
    """`gradient` was just set to 0 where `mask` is False."""
    _masked[mask] = StorageWeakRef(gradient.untyped_storage()), gradient._version


def is_masked(gradient: Tensor, mask: Tensor) -> bool:
    """Whether `note_masked` was told so last of this memory, and nobody has written to it since."""
    masked = _masked.get(mask)
    if masked is None or type(gradient) is not Tensor:
        return False
    return masked == (StorageWeakRef(gradient.untyped_storage()), gradient._version)
