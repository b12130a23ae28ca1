"""fxsparse: a graph compiler for sparse training in PyTorch.

sparse = fxsparse.sparsify(model, example_input, method="rigl", sparsity=0.9, distribution="erk")
optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
rewirer = sparse.attach(optimizer, total_steps=97_656)
# ... the training loop as it was ...
print(sparse.report())
"""

from pathlib import Path

# `passes/` and `models/` stand beside this folder in the repository and below it when installed.
_repository = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "passes").is_dir() and (_repository / "passes" / "trace.py").is_file():
    __path__.append(str(_repository))

from .captured_module import CapturedModule  # noqa: E402
from .channels import ChannelGroups, CompactModule, channel_groups, compact  # noqa: E402
from .core.allocation import allocate  # noqa: E402
from .core.errors import (  # noqa: E402
    AllocationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    FxSparseError,
    FxSparseWarning,
    InputError,
    RuntimeStateError,
    SelectionError,
    VerificationError,
)
from .core.masking import apply_mask  # noqa: E402
from .flops import FlopReport, count_flops, plan_flops, planned_cost, realised_cost  # noqa: E402
from .lowering import LoweredModule, lower  # noqa: E402
from .runtime.history import Rewiring  # noqa: E402
from .runtime.methods import Method, Moment, Need, Pattern, Quota, method_options, methods  # noqa: E402
from .runtime.rewirer import Rewirer  # noqa: E402
from .runtime.semantics import Semantics  # noqa: E402
from .runtime.telemetry import SiteTelemetry  # noqa: E402
from .runtime.update_rules import rigl_update, set_update, snip_score  # noqa: E402
from .saving import load_sparse, save_sparse  # noqa: E402
from .sparse_module import SparseModule  # noqa: E402
from .sparsify import sparsify  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AllocationError",
    "CaptureError",
    "CapturedModule",
    "ChannelGroups",
    "CheckpointError",
    "CompactModule",
    "ConfigError",
    "DataError",
    "FlopReport",
    "FxSparseError",
    "FxSparseWarning",
    "InputError",
    "LoweredModule",
    "Method",
    "Moment",
    "Need",
    "Pattern",
    "Quota",
    "Rewirer",
    "Rewiring",
    "RuntimeStateError",
    "SelectionError",
    "Semantics",
    "SiteTelemetry",
    "SparseModule",
    "VerificationError",
    "allocate",
    "apply_mask",
    "channel_groups",
    "compact",
    "count_flops",
    "load_sparse",
    "lower",
    "method_options",
    "methods",
    "plan_flops",
    "planned_cost",
    "realised_cost",
    "rigl_update",
    "save_sparse",
    "set_update",
    "snip_score",
    "sparsify",
]
