import numpy as np
import pytest

from training.evaluation import Answers, shortfall, trained_sizes
from training.tasks import TASKS, make_task


def answers(wrong, loss):
    return Answers(np.asarray(wrong, float), np.asarray(loss, float), np.full(len(wrong), 8.0))


def test_where_every_bit_can_be_known_it_is_the_mean_number_of_wrong_bits():
    task = make_task("copy")
    batch = task.validation_batch(np.random.default_rng(0), 4)
    assert shortfall(task, batch, answers([0, 0, 3, 0], [0.1, 0, 9, 0])) == 0.75
    assert shortfall(task, batch, answers([0] * 4, [5.0] * 4)) == 0.0


def test_where_no_bit_can_be_known_it_is_the_loss_beyond_one_percent_more_than_the_optimal_predictors():
    task = make_task("ngrams", length=30)
    batch = task.validation_batch(np.random.default_rng(0), 5)
    optimal = task.optimal_bits(batch)
    assert shortfall(task, batch, answers([15] * 5, 1.009 * optimal)) == 0.0
    assert shortfall(task, batch, answers([15] * 5, 1.06 * optimal)) == pytest.approx(0.05 * optimal.mean())


@pytest.mark.parametrize("name", TASKS)
def test_an_examination_in_the_trained_sizes_holds_each_of_them_in_the_shape_of_the_training(name):
    task = make_task(name)
    batch = trained_sizes(task, np.random.default_rng(0), 11)
    assert batch.inputs.shape[1:] == (task.max_time, task.input_dim)
    assert len(batch.mask) >= 11
    asked = set(batch.mask.sum(1))
    drawn = {size: task.test_batch(np.random.default_rng(0), 1, size).mask for size in task.sizes()}
    assert asked == {mask.sum() for mask in drawn.values() if mask.shape[1] <= task.max_time}
