"""A process of its own for a contender; see `bench_parts.serving`.

{"do": "load", "contender": NAME, "case": {...}}  makes the trainer and goes on to its first rewiring
{"do": "turn", "number": N}                       a stretch of ordinary steps, then an update step, timed
{"do": "memory", "number": N}                     the peak of an ordinary and of an update step
{"do": "end", "number": N, "steps": S}            goes on to S steps; what became of masks and losses
{"do": "sparsify", "network": NAME}               seconds of `sparsify`
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from bench_parts.serving import serve_requests, use_threads

from .goals import STRETCH, WARM
from .memory import peak_on_cpu, peak_on_cuda
from .trainers import TRAINERS, Trainer


class Run:
    """A trainer between two of its rewirings: `interval` steps lie ahead, the last one with a rewiring."""

    def __init__(self, contender: str, case: dict[str, Any]) -> None:
        self.device = torch.device(case["device"]).type
        self.stretch, self.warm = STRETCH[self.device], WARM[self.device]
        self.interval = self.warm + self.stretch + 1
        self.trainer: Trainer = TRAINERS[contender]({**case, "interval": self.interval})
        self.first_masks = [mask.cpu().clone() for _, mask, _ in self.trainer.masked()]
        self.steps = 0
        if not self.trainer.sparse:
            self.step(self.interval)
            return
        while not self.trainer.rewirings:
            self.step()
            if self.steps > 2 * self.interval:
                raise RuntimeError(f"no rewiring in {self.steps} steps at interval {self.interval}")

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.trainer.step()
            self.steps += 1

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Wall-clock and processor seconds, until the device is done."""
        self.wait()
        start, busy = time.perf_counter(), time.process_time()
        call()
        self.wait()
        return time.perf_counter() - start, time.process_time() - busy

    def turn(self) -> dict[str, list[float]]:
        """Seconds (wall clock, processor) of an ordinary step, an update step, and the rewiring within it."""
        self.step(self.warm)
        found = {"step": [seconds / self.stretch for seconds in self.timed(lambda: self.step(self.stretch))]}
        before = self.trainer.rewirings
        start = self.timed(self.trainer.forward_backward)
        moved = self.timed(self.trainer.move_weights)
        rewired = self.timed(self.trainer.rewire_if_due)
        self.steps += 1
        if self.trainer.sparse:
            if self.trainer.rewirings != before + 1:
                raise RuntimeError(f"{self.trainer.rewirings - before} rewirings in a step that is to have one")
            found["update"] = [sum(parts) for parts in zip(start, moved, rewired, strict=True)]
            found["rewiring"] = list(rewired)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the other contenders need it
        return found

    def memory(self) -> dict[str, int]:
        """Peak bytes of an ordinary step and of an update step."""
        self.step(self.interval - 2)
        return {"ordinary": self.peak(), "update": self.peak()} if self.trainer.sparse else {"ordinary": self.peak()}

    def peak(self) -> int:
        self.trainer.zero_grad()
        if self.device == "cuda":
            return peak_on_cuda(self.step, reserved=self.trainer.graphs)
        return peak_on_cpu(self.step, *self.trainer.roots)

    def end(self, steps: int) -> dict[str, Any]:
        """Whether the numbers of active weights are the wanted ones, all others 0; and what training did."""
        if self.trainer.sparse:
            self.step(max(0, steps - self.steps))
        losses = torch.stack(self.trainer.losses).float().tolist()
        masked = self.trainer.masked()
        active = [int(mask.sum()) for _, mask, _ in masked]
        stray = sum(int(((weight != 0) & ~mask.bool()).sum()) for weight, mask, _ in masked)
        total = sum(mask.numel() for _, mask, _ in masked)
        moved = sum(
            int((first.bool() & ~mask.cpu().bool()).sum())
            for first, (_, mask, _) in zip(self.first_masks, masked, strict=True)
        )
        return {
            "steps": self.steps,
            "rewirings": self.trainer.rewirings,
            "losses": [losses[0], sum(losses[-5:]) / len(losses[-5:])],
            "finite": all(loss == loss and abs(loss) < float("inf") for loss in losses),
            "layers": len(masked),
            "wrong_layers": sum(a != count for a, (_, _, count) in zip(active, masked, strict=True)),
            "stray": stray,
            "sparsity": 1 - sum(active) / total if total else None,
            "moved": moved / max(1, sum(active)),
            "graphs": _variants(),
        }


def _variants() -> int:
    """Graphs that dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def serve(request: dict[str, Any], loaded: dict[int, Any]) -> dict[str, Any]:
    if request["do"] == "sparsify":
        use_threads(request["threads"])
        return {"seconds": seconds_of_sparsify(request["network"])}
    if request["do"] == "load":
        use_threads(request["case"]["threads"])
        number = len(loaded)
        loaded[number] = Run(request["contender"], request["case"])
        return {"number": number, "first_loss": loaded[number].trainer.losses[0].item()}
    run = loaded[request["number"]]
    if request["do"] == "turn":
        return run.turn()
    if request["do"] == "memory":
        return run.memory()
    return run.end(request["steps"])


def seconds_of_sparsify(name: str) -> float:
    """`sparsify` of a network of torchvision; of one on meta without verifying."""
    import torchvision

    import fxsparse

    x = torch.randn(1, 3, 224, 224)
    on_meta = name.startswith("vit")
    with torch.device("meta" if on_meta else "cpu"):
        model = torchvision.models.get_model(name)
    start = time.perf_counter()
    fxsparse.sparsify(model, x.to("meta") if on_meta else x, "rigl", sparsity=0.9, verify=not on_meta)
    return time.perf_counter() - start


if __name__ == "__main__":
    serve_requests(serve)
