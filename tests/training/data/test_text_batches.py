"""Sequences of a text: a pure function of (seed, epoch, batch) in training, all of it in evaluation."""

import pytest
import torch

from fxsparse.core.errors import ConfigError
from fxsparse.training.data import TextBatches, in_order
from fxsparse.training.data.text_batches import IGNORED, row_count


def counting(characters):
    """A text in which a character tells its place, up to 256 of them."""
    return torch.arange(characters).to(torch.uint8)


def starts(batches, epoch=0):
    """Where each sequence of an epoch begins."""
    return torch.cat([inputs[:, 0] for inputs, _ in batches.epoch(epoch)]).tolist()


def test_targets_are_the_characters_that_follow():
    for inputs, targets in TextBatches(counting(200), 4, 7).epoch(3):
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (4, 7)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(7)) and torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_an_epoch_from_the_middle_is_the_tail_of_the_whole_epoch(start):
    batches = TextBatches(counting(200), 4, 7, seed=3)
    whole = list(batches.epoch(2))
    assert len(whole) == len(batches) == 6
    torch.manual_seed(99)
    tail = list(batches.epoch(2, start))
    assert len(tail) == 6 - start
    for found, expected in zip(tail, whole[start:], strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_sequences_do_not_overlap_and_all_are_taken():
    # 205 = 29 x 7 + 2: 28 sequences fit at every offset, which 7 batches of 4 take all
    batches = TextBatches(counting(205), 4, 7)
    offsets = set()
    for epoch in range(60):
        places = sorted(starts(batches, epoch))
        offset = places[0]
        assert places == list(range(offset, offset + 28 * 7, 7))
        offsets.add(offset)
    assert offsets == set(range(7))  # every cut comes up


def test_the_last_character_is_a_target_and_none_beyond_it_is_asked_for():
    batches = TextBatches(counting(21), 1, 7)  # 2 sequences; at offset 6 they end with character 20
    last = {int(max(targets.max() for _, targets in batches.epoch(epoch))) for epoch in range(60)}
    assert last == set(range(14, 21))


def test_epochs_and_seeds_differ_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    orders = [starts(TextBatches(counting(250), 4, 7, seed=seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != sorted(orders[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_that_is_too_short_says_how_long_it_must_be():
    assert len(TextBatches(counting(35), 4, 7)) == 1
    with pytest.raises(ConfigError, match=r"34 characters; batch_size 4 and sequence_length 7 need 35"):
        TextBatches(counting(34), 4, 7)
    with pytest.raises(ConfigError, match=r"start 2 is not in 0\.\.1"):
        next(TextBatches(counting(35), 4, 7).epoch(0, 2))


@pytest.mark.parametrize(
    ("characters", "length"), [(2, 1), (2, 64), (17, 4), (250, 1), (1026, 1), (5000, 3), (9999, 7), (70_000, 64)]
)
def test_in_order_every_character_but_the_first_is_a_target_once_in_rows_that_go_on(characters, length):
    text = torch.randint(0, 256, (characters,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = list(in_order(text, length))
    assert {inputs.shape for inputs, _ in batches} == {(row_count(characters - 1, length), length)}
    inputs, targets = (torch.cat(each, dim=1) for each in zip(*batches, strict=True))
    asked = targets != IGNORED
    assert inputs[asked].tolist() == text[:-1].tolist() and targets[asked].tolist() == text[1:].tolist()
    # nothing is asked after the first place in a row that is filled up
    assert not (asked[:, 1:] & ~asked[:, :-1]).any()


def test_rows_are_few_and_long():
    assert [row_count(n, 10) for n in (1, 319, 320, 3200, 10_240, 10_000_000)] == [1, 1, 2, 20, 64, 64]
