"""Writes shape, dtype and stride of every value on its node, without computing any."""

from typing import Any

from torch import fx

from fxsparse.capture.fake_interpreter import FakeInterpreter
from fxsparse.core.graphs import attribute
from fxsparse.core.records import Captured, specs_of, update_record


class _ShapeWriter(FakeInterpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        update_record(n, spec=specs_of(value))
        return value


def annotate_shapes(captured: Captured) -> None:
    """Annotates every node of every graph for the captured example (see `NodeRecord.spec`).

    Runs on fake tensors: no arithmetic, no memory for weights, BatchNorm statistics untouched.
    """
    modes = {module: module.training for module in captured.model.modules()}
    try:
        for mode, graph in captured.distinct_graphs():
            captured.model.train(mode == "train")
            _ShapeWriter(captured.model, graph).run_example(captured.example)
        for mode, name, graph in captured.units.distinct_graphs() if captured.units else ():
            captured.model.train(mode == "train")
            example = captured.units.example_of(mode, name)
            if example is not None:
                _ShapeWriter(captured.model, graph).run_example(example)
                continue
            for node in graph.find_nodes(op="get_attr"):  # the example does not reach it; its weights have shapes
                update_record(node, spec=specs_of(attribute(captured.model, str(node.target))))
    finally:
        for module, training in modes.items():
            module.training = training
