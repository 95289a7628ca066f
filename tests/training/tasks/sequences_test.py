"""Repeat copy, associative recall and priority sort against what plain loops read off the inputs."""

import numpy as np
import pytest

from tests.training.tasks.oracles import associative_recall, flags, priority_sort, repeat_copy
from training.tasks import TASKS, make_task, trimmed
from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.copy import CopyTask
from training.tasks.priority_sort import PrioritySortTask
from training.tasks.repeat_copy import RepeatCopyTask

REPEAT = [RepeatCopyTask(), RepeatCopyTask(bits=3, min_length=2, max_length=4, min_repeats=2, max_repeats=5)]
RECALL = [AssociativeRecallTask(), AssociativeRecallTask(bits=3, item_length=2, min_items=3, max_items=5)]
SORT = [PrioritySortTask(), PrioritySortTask(bits=3, shown=7, returned=4)]


def rows(batch):
    return zip(batch.inputs, batch.targets, batch.mask, strict=True)


def assert_asks(targets, mask, asked):
    """The mask is up at these steps alone, and the targets are these there and zero elsewhere."""
    assert list(np.flatnonzero(mask)) == [step for step, _ in asked]
    assert set(mask) <= {0.0, 1.0}
    for step, values in asked:
        assert list(targets[step]) == values
    assert not targets[mask == 0].any()


@pytest.mark.parametrize("task", REPEAT)
def test_repeat_copy_asks_for_all_copies_and_then_the_end_marker(task):
    for inputs, targets, mask in rows(task.training_batch(np.random.default_rng(0), 60)):
        (end,) = flags(inputs, task.bits + 1)
        length = end - 1
        repeats, rest = divmod(int(mask.sum()) - 1, length)
        assert rest == 0
        assert task.min_length <= length <= task.max_length
        assert task.min_repeats <= repeats <= task.max_repeats
        assert_asks(targets, mask, repeat_copy(inputs, task.bits, repeats))
        assert not inputs[end + 1 :].any(), "nothing is shown while the network answers"


@pytest.mark.parametrize("task", REPEAT)
def test_the_number_of_repeats_has_mean_zero_and_variance_one_over_the_training_range(task):
    shown = {}
    for repeats in range(task.min_repeats, task.max_repeats + 1):
        inputs = task.test_batch(np.random.default_rng(0), 1, (3, repeats)).inputs[0]
        (step,) = np.flatnonzero(inputs[:, task.bits + 2])
        assert inputs[step, task.bits + 1] == 1, "it stands beside the end flag"
        shown[repeats] = inputs[step, task.bits + 2]
    values = np.array(list(shown.values()))
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.var() == pytest.approx(1, abs=1e-5)
    assert np.diff(values) == pytest.approx(values[1] - values[0])


def test_a_single_number_of_repeats_is_shown_as_zero():
    task = RepeatCopyTask(min_repeats=2, max_repeats=2)
    assert task.training_batch(np.random.default_rng(0), 5).inputs[:, :, task.bits + 2].any() == np.False_


@pytest.mark.parametrize("task", RECALL)
def test_associative_recall_asks_for_the_item_after_the_one_shown_again(task):
    for inputs, targets, mask in rows(task.training_batch(np.random.default_rng(0), 100)):
        assert_asks(targets, mask, associative_recall(inputs, task.bits))
        count = len(flags(inputs, task.bits))
        assert task.min_items <= count <= task.max_items
        first, last = flags(inputs, task.bits + 1)
        assert first == count * (task.item_length + 1)
        assert last - first == task.item_length + 1
        assert not inputs[last + 1 :].any(), "nothing is shown while the network answers"


def test_every_item_but_the_first_is_asked_for_and_about_equally_often():
    task = AssociativeRecallTask()
    batch = task.test_batch(np.random.default_rng(0), 2000, (6,))
    asked = np.zeros(6)
    for inputs, targets, mask in rows(batch):
        items = inputs[:24].reshape(6, 4, 8)[:, 1:, :6]
        asked += [np.array_equal(item, targets[mask == 1]) for item in items]
    assert asked[0] == 0
    assert asked.sum() == 2000
    assert asked[1:] / 2000 == pytest.approx(0.2, abs=0.04)


def test_the_items_of_an_episode_differ_even_where_chance_repeats_them():
    task = AssociativeRecallTask(bits=1, item_length=6, max_items=8)
    for inputs, _, _ in rows(task.test_batch(np.random.default_rng(0), 20, (8,))):
        items = inputs[:56].reshape(8, 7, 3)[:, 1:, 0]
        assert len(np.unique(items, axis=0)) == 8


@pytest.mark.parametrize("task", SORT)
def test_priority_sort_asks_for_the_vectors_of_highest_priority_highest_first(task):
    batch = task.training_batch(np.random.default_rng(0), 40)
    for inputs, targets, mask in rows(batch):
        assert_asks(targets, mask, priority_sort(inputs, task.bits, task.returned))
        assert not inputs[task.shown + 2 :].any(), "nothing is shown while the network answers"
    priorities = batch.inputs[:, 1 : task.shown + 1, task.bits]
    assert priorities.min() > -1
    assert priorities.max() < 1
    assert priorities.mean() == pytest.approx(0, abs=0.1)
    assert priorities.var() == pytest.approx(1 / 3, abs=0.05)


def test_trimmed_batches_lose_only_steps_behind_the_last_one_asked_for():
    batches = [CopyTask().training_batch(np.random.default_rng(seed), 3, 0.25) for seed in range(4)]
    longest = max(int(np.flatnonzero(batch.mask.any(0))[-1]) + 1 for batch in batches)
    found = trimmed(batches, multiple=5)
    steps = {batch.mask.shape[1] for batch in found}
    assert len(steps) == 1
    assert longest <= min(steps) < longest + 5
    assert min(steps) % 5 == 0
    for before, after in zip(batches, found, strict=True):
        assert all((a[:, : b.shape[1]] == b).all() for a, b in zip(before, after, strict=True))
        assert after.mask.sum() == before.mask.sum()


def test_a_lower_difficulty_draws_smaller_sequences_in_the_same_shape():
    generator = np.random.default_rng(0)
    repeat = RepeatCopyTask().training_batch(generator, 300, 0.3)
    assert repeat.inputs.shape == (300, RepeatCopyTask().max_time, 11)
    assert repeat.mask.sum(1).max() == 3 * 3 + 1
    recall = AssociativeRecallTask().training_batch(generator, 200, 0.5)
    assert (recall.inputs[:, :, 6].sum(1)).max() == 3
    sort = PrioritySortTask().training_batch(generator, 5, 0.25)
    assert (sort.mask.sum(1) == 4).all()
    assert sort.inputs.shape == (5, 38, 11)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_follows_from_the_generator_and_has_the_sizes_that_the_task_tells(name):
    task = make_task(name)
    for draw in (task.training_batch, task.validation_batch):
        first, again, other = (draw(np.random.default_rng(seed), 6) for seed in (5, 5, 6))
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert (first.inputs != other.inputs).any()
        steps = first.mask.shape[1]
        assert first.inputs.shape == (6, steps, task.input_dim)
        assert first.targets.shape == (6, steps, task.output_dim)
        assert all(array.dtype == np.float32 for array in first)
    assert task.training_batch(np.random.default_rng(0), 2).inputs.shape[1] == task.max_time


@pytest.mark.parametrize("name", TASKS)
def test_every_size_of_the_table_can_be_drawn_and_asks_for_as_much_in_each_sequence(name):
    task = make_task(name)
    for size in task.sizes():
        batch = task.test_batch(np.random.default_rng(0), 3, size)
        asked = batch.mask.sum(1)
        assert asked[0] > 0
        assert (asked == asked[0]).all()
