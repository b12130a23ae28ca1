"""Tries the removal of channels, and pins those at nodes that cannot be rewritten after all."""

import torch

from fxsparse.core.labelled_model import LabelledModel

from .compact_channels import never_empty, without_refused
from .rewrite_channels import CannotRewrite, rewrite_channels

TRIALS = 2
"""How many random halves of the channels are tried."""


def try_removal(labelled: LabelledModel) -> None:
    """Rewrites all graphs without a random half of the channels that may go, a few times over.

    The rules say what is mixed with what; whether every view between can be written for fewer channels shows only
    when it is done. What is refused is pinned, with the node as the reason.
    """
    space = labelled.space
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        half = torch.rand(len(space.stays), generator=generator) < 0.5
        while True:
            gone = never_empty(labelled, half[space.representatives] & ~space.stays)
            try:
                for mode, _graph in labelled.captured.distinct_graphs():
                    rewrite_channels(labelled, mode, gone)
                break
            except CannotRewrite as refusal:
                if torch.equal(without_refused(labelled, gone, refusal), gone):
                    raise
