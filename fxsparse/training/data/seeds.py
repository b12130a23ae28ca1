"""Independent random streams from one seed, so that no draw depends on what was drawn before it."""

import hashlib

import torch


def stream(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments: `stream("batch", seed, epoch, batch)`.

    The arguments are hashed, because neighbouring seeds of a Mersenne twister give related first draws.
    """
    text = ":".join([purpose, *(str(int(n)) for n in numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
