"""What is timed, one function each: it loads a case and returns the call to time. Runs in a worker process."""

import copy
from pathlib import Path
from typing import Any

from .turns import Case, Loaded, once


def eager(case: Case) -> Loaded:
    """PyTorch as it is; `format` names the memory format."""
    if case["kind"] == "layers":
        from .single_layers import dense_layer

        return dense_layer(case)
    if case["kind"] == "storage":
        return _dense_storage(case)
    return _torch_dense(case, compiled=False)


def inductor(case: Case) -> Loaded:
    """`torch.compile`; for inference with its weights frozen, which folds and packs them."""
    return _torch_dense(case, compiled=True)


def _torch_dense(case: Case, compiled: bool) -> Loaded:
    import torch

    from . import networks

    model, x = networks.dense_network(case)
    memory_format = torch.channels_last if case.get("format") == "channels_last" else torch.contiguous_format
    plain = copy.deepcopy(model)
    if x.dim() == 4:
        model, layout = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
    else:
        layout = x
    if case["kind"] == "training":
        labels = networks.labels_for(case)
        run = torch.compile(model) if compiled else model
        error = networks.step_error(model, run, plain, layout, labels)
        training = networks.Training(run.train(), layout, labels)
        return Loaded(once(training.step), error)
    import torch._inductor.config

    torch._inductor.config.freezing = True
    run = torch.compile(model.eval()) if compiled else model.eval()

    def call() -> Any:
        with torch.no_grad():
            return run(layout)

    with torch.no_grad():
        error = networks.relative_error(networks.first_output(call()), networks.first_output(plain.eval()(x)))
    return Loaded(once(call), error)


def export(case: Case) -> Loaded:
    """Not timed: writes the dense network as ONNX, its input and its eager output, for those that read ONNX."""
    import numpy
    import torch

    from . import networks

    model, x = networks.dense_network(case)
    folder = Path(case["folder"])
    with torch.no_grad():
        output = networks.first_output(model.eval()(x))
        torch.onnx.export(model, (x,), folder / "network.onnx", dynamo=not case.get("variant"), verbose=False)
    numpy.savez(folder / "data.npz", x=x.numpy(), output=output.numpy())
    return Loaded(list)


def _onnx_error(found: Any, expected: Any) -> float:
    import numpy

    if found.shape != expected.shape or not numpy.isfinite(found).all():
        return float("inf")
    return float(numpy.abs(found.astype("float64") - expected).max() / numpy.abs(expected).max())


def onnxruntime(case: Case) -> Loaded:
    """ONNX Runtime, all graph optimizations."""
    import numpy
    import onnxruntime

    folder = Path(case["folder"])
    data = numpy.load(folder / "data.npz")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case["threads"]
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: data["x"]}
    error = _onnx_error(session.run(None, given)[0], data["output"])
    return Loaded(once(lambda: session.run(None, given)), error, {"version": onnxruntime.__version__})


def openvino(case: Case) -> Loaded:
    """OpenVINO, latency hint, held to fp32 (by itself it may choose bfloat16)."""
    import numpy
    import openvino

    folder = Path(case["folder"])
    data = numpy.load(folder / "data.npz")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": case["threads"],
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.compile_model(str(folder / "network.onnx"), "CPU", options).create_infer_request()
    x = data["x"]

    def call() -> Any:
        return request.infer({0: x}, share_inputs=True, share_outputs=True)

    error = _onnx_error(numpy.asarray(call()[0]), data["output"])
    return Loaded(once(call), error, {"version": openvino.__version__})


def sparseprop(case: Case) -> Loaded:
    """SparseProp's single layers; `variant` is what it vectorizes over."""
    from .single_layers import sparseprop_layer

    return sparseprop_layer(case)


def ours(case: Case) -> Loaded:
    """Lowered by fxsparse, checked against the user's own model with masked weights."""
    if case["kind"] == "layers":
        from .single_layers import lowered_layer

        return lowered_layer(case)
    if case["kind"] == "inference":
        return _ours_inference(case)
    return _ours_training(case)


def _ours_inference(case: Case) -> Loaded:
    import torch

    from . import networks

    sparse, reference, x = networks.sparse_network(case)
    density = 1 - sparse.sparsity
    lowered = sparse.eval().lower()

    def call() -> Any:
        with torch.no_grad():
            return lowered(x)

    with torch.no_grad():
        error = networks.relative_error(networks.first_output(call()), networks.first_output(reference.eval()(x)))
    return Loaded(once(call), error, {"density": density})


def _ours_training(case: Case) -> Loaded:
    from bench_parts.storage import kept_bytes

    from . import networks
    from .goals import CYCLE

    case = {**case, "more": {"update_interval": CYCLE, "stop_fraction": 1.0}}
    sparse, reference, x = networks.sparse_network(case)
    density = 1 - sparse.sparsity
    labels = networks.labels_for(case)
    lowered = sparse.lower(train=True)
    error = networks.step_error(lowered, lowered, reference, x, labels)
    del sparse, reference
    training = networks.Training(lowered.train(), x, labels)
    lowered.attach(training.optimizer, 10_000)
    step = once(training.step)
    for _ in range(CYCLE + 1):  # the steps t = 0 to 4, the first rewiring with them
        training.step()
    if case["kind"] == "storage":
        training.step()  # a rewiring may leave no gradients behind, an ordinary step does
    facts: dict[str, Any] = {"density": density}
    if case["kind"] == "storage":
        facts["bytes"] = kept_bytes(lowered, training.optimizer)
    return Loaded(lambda: [step()[0] for _ in range(CYCLE)], error, facts)


def _dense_storage(case: Case) -> Loaded:
    from bench_parts.storage import kept_bytes

    from . import networks

    model, x = networks.dense_network(case)
    training = networks.Training(model.train(), x, networks.labels_for(case))
    training.step()
    return Loaded(list, facts={"bytes": kept_bytes(model, training.optimizer)})


CONTENDERS = {call.__name__: call for call in (eager, inductor, export, onnxruntime, openvino, sparseprop, ours)}
