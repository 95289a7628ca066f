import numpy as np
import pytest

from tests.training.tasks.oracles import ngrams_loss
from training.tasks.ngrams import NGramsTask


def whole(batch, row):
    """The bits of a sequence, the last one included."""
    return [*batch.inputs[row, :, 0].astype(int), int(batch.targets[row, -1, 0])]


@pytest.fixture(params=[(200, 5), (23, 2)])
def task(request):
    return NGramsTask(length=request.param[0], context=request.param[1])


def test_each_target_is_the_next_input_and_the_first_context_is_not_asked_for(task):
    batch = task.training_batch(np.random.default_rng(0), 7)
    assert batch.inputs.shape == (7, task.context + task.length - 1, 1)
    assert (batch.targets[:, :-1] == batch.inputs[:, 1:]).all()
    assert set(np.unique(batch.inputs)) == {0.0, 1.0}
    assert (batch.mask.sum(1) == task.length).all()
    assert not batch.mask[:, : task.context - 1].any()


def test_the_optimal_predictor_loses_what_plain_counting_does(task):
    batch = task.training_batch(np.random.default_rng(1), 5)
    expected = [ngrams_loss(whole(batch, row), task.context, first=task.context) for row in range(5)]
    assert task.optimal_bits(batch) == pytest.approx(expected, rel=1e-6)


def test_the_optimal_predictor_learns_from_what_is_not_counted():
    task, batch = NGramsTask(), NGramsTask().training_batch(np.random.default_rng(2), 5)
    batch.mask[:, :150] = 0.0
    expected = [ngrams_loss(whole(batch, row), 5, first=151) for row in range(5)]
    assert task.optimal_bits(batch) == pytest.approx(expected, rel=1e-6)


def test_the_bits_come_from_a_table_of_the_beta_distribution_a_new_one_for_each_sequence():
    task = NGramsTask(length=3000, context=1)
    bits = task.training_batch(np.random.default_rng(3), 1000).inputs[:, :, 0]
    chances = np.array([row[1:][row[:-1] == 1].mean() for row in bits if (row[:-1] == 1).sum() > 30])
    assert chances.mean() == pytest.approx(0.5, abs=0.05)
    assert chances.var() == pytest.approx(1 / 8, abs=0.015)
    # The arcsine law: half of the mass lies in these ends, where an even distribution has 0.3 of it.
    assert ((chances < 0.15) | (chances > 0.85)).mean() == pytest.approx(0.506, abs=0.05)


def test_the_optimum_at_the_size_of_the_paper_is_near_the_one_it_reports():
    task = NGramsTask()
    batch = task.test_batch(np.random.default_rng(4), 3000, (200,))
    # About 131.2 over many sequences, whose deviation is 37; a fair coin loses 200.
    assert task.optimal_bits(batch).mean() == pytest.approx(131.2, abs=2.5)


def test_a_lower_difficulty_asks_for_the_first_bits_only():
    batch = NGramsTask().training_batch(np.random.default_rng(0), 3, 0.25)
    assert (batch.mask.sum(1) == 50).all()
    assert batch.mask[:, 4:54].all()
