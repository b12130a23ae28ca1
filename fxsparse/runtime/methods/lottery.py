"""The lottery ticket hypothesis (Frankle and Carbin 2019): masks found by pruning, weights rewound, then static.

FLOP ledger of a training step: `3 f_s`, beside the run that found the masks.
"""

from .static import Static


class Lottery(Static):
    """Given masks over weights of an early step, never rewired. `sparsify` takes the masks as `masks=`."""

    name = "lottery"
    summary = "masks of a pruning run, weights rewound, never rewired"
    needs_masks = True
