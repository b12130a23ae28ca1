"""Selection over ranks' parts against sorting everything; the ranks are threads."""

import math
import threading

import pytest
import torch

from fxsparse.runtime.sharded_selection import select_over_ranks


class Ranks:
    """Threads that exchange tensors as ranks do."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.given = [None] * count
        self.exchanged = [0] * count

    def gather(self, rank, tensor):
        self.exchanged[rank] += tensor.numel()
        self.given[rank] = tensor.clone()
        self.barrier.wait()
        gathered = list(self.given)
        self.barrier.wait()
        return gathered

    def run(self, work):
        results, errors = [None] * self.count, []

        def body(rank):
            try:
                results[rank] = work(rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return results


def selected(scores, candidates, count, largest):
    """Of parts, one a rank: the parts of the selection."""
    ranks = Ranks(len(scores))

    def work(rank):
        def before(value, after):
            each = ranks.gather(rank, value)
            return sum(each[rank + 1 :] if after else each[:rank], torch.zeros((), dtype=torch.int64))

        return select_over_ranks(
            scores[rank],
            candidates[rank],
            count,
            largest=largest,
            add_up=lambda values: sum(ranks.gather(rank, values)),
            before=before,
        )

    return ranks.run(work), ranks.exchanged


def sorted_selection(score, candidates, count, largest):
    """By the words of `select`: largest first, then lowest index; smallest first, then highest index; NaN last."""

    def order(index):
        value = score[index]
        if largest:
            return (math.inf if math.isnan(value) else -value, index)
        return (math.inf if math.isnan(value) else value, -index)

    return set(sorted((i for i, allowed in enumerate(candidates) if allowed), key=order)[:count])


def parts(tensor, ranks):
    """As a DTensor is cut: `ceil(rows / ranks)` rows each, the last ones fewer or none."""
    step = -(-len(tensor) // ranks)
    return [tensor[rank * step : (rank + 1) * step] for rank in range(ranks)]


SPECIAL = {
    "distinct": lambda score, g: score,
    "ties": lambda score, g: score.round(),
    "all equal": lambda score, g: torch.zeros_like(score),
    "two zeros": lambda score, g: torch.where(torch.rand(score.shape, generator=g) < 0.5, 0.0, -0.0).to(score.dtype),
    "not finite": lambda score, g: torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0], dtype=score.dtype)[
        torch.randint(0, 5, score.shape, generator=g)
    ],
    "close together": lambda score, g: (1 + score.abs() * torch.finfo(score.dtype).eps).to(score.dtype),
    "tiny": lambda score, g: score * torch.finfo(score.dtype).tiny,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SPECIAL)
def test_selection_over_ranks_is_that_of_sorting_everything(kind, dtype):
    generator = torch.Generator().manual_seed(list(SPECIAL).index(kind))
    for case in range(12):
        rows, ranks = (int(torch.randint(1, high, (), generator=generator)) for high in (8, 5))
        score = SPECIAL[kind](torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64).to(dtype), generator)
        candidates = torch.rand(score.shape, generator=generator) < 0.7
        count = int(torch.randint(0, int(candidates.sum()) + 1, (), generator=generator))
        largest = bool(case % 2)
        chosen, _ = selected(parts(score, ranks), parts(candidates, ranks), count, largest)
        flat = torch.cat([part.flatten() for part in chosen]).tolist()
        expected = sorted_selection(score.flatten().tolist(), candidates.flatten().tolist(), count, largest)
        assert {i for i, taken in enumerate(flat) if taken} == expected, (case, count, largest)
        assert [part.shape for part in chosen] == [part.shape for part in parts(score, ranks)]


def test_traffic_does_not_grow_with_the_tensor():
    amounts = []
    for size in (1_000, 100_000):
        score = torch.rand(size, generator=torch.Generator().manual_seed(0))
        halves = parts(score, 2)
        _, exchanged = selected(halves, [torch.ones_like(half, dtype=torch.bool) for half in halves], size // 3, True)
        amounts.append(exchanged)
    assert amounts == [[3 * 2048 + 1] * 2] * 2
