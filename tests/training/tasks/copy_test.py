import numpy as np
import pytest

from training.tasks.copy import CopyTask


def rows(batch):
    return zip(batch.inputs, batch.targets, batch.mask, strict=True)


@pytest.fixture(params=[(8, 1, 20), (3, 2, 5)])
def task(request):
    bits, shortest, longest = request.param
    return CopyTask(bits=bits, min_length=shortest, max_length=longest)


@pytest.mark.parametrize("draw", ["training_batch", "hard_batch"])
def test_every_sequence_is_flag_vectors_flag_and_the_same_vectors_asked_for(task, draw):
    batch = getattr(task, draw)(np.random.default_rng(0), 50)
    assert batch.inputs.shape == (50, task.max_time, task.input_dim)
    for inputs, targets, mask in rows(batch):
        length = int(mask.sum())
        assert task.min_length <= length <= task.max_length
        start, end = inputs[:, task.bits], inputs[:, task.bits + 1]
        assert list(np.flatnonzero(start)) == [0]
        assert list(np.flatnonzero(end)) == [length + 1]
        for position in range(length):
            asked = length + 2 + position
            assert mask[asked] == 1
            assert list(targets[asked]) == list(inputs[1 + position, : task.bits])
        assert not inputs[length + 2 :].any(), "nothing is shown while the network recalls"
        assert not targets[: length + 2].any()
        assert not targets[2 * length + 2 :].any()


def test_all_lengths_are_drawn_and_none_beyond(task):
    batch = task.training_batch(np.random.default_rng(1), 2000)
    lengths = set(batch.mask.sum(1).astype(int))
    assert lengths == set(range(task.min_length, task.max_length + 1))


def test_a_lower_difficulty_draws_shorter_sequences_in_the_same_shape(task):
    batch = task.training_batch(np.random.default_rng(1), 200, 0.5)
    assert batch.mask.sum(1).max() == max(task.min_length, round(task.max_length * 0.5))
    assert batch.inputs.shape == (200, task.max_time, task.input_dim)


def test_the_same_generator_gives_the_same_sequences_and_another_others(task):
    first, again, other = (task.training_batch(np.random.default_rng(seed), 4) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.inputs != other.inputs).any()


def test_vectors_are_blanked_and_skewed_in_training_and_never_in_tests():
    task = CopyTask(bits=40, blank=0.25, skewed=0.5)
    generator = np.random.default_rng(0)
    training = task.training_batch(generator, 400)
    ones = training.targets[training.mask.astype(bool)].mean(-1)
    # A quarter is blank; half has a density between 0 and 1, of which 0.3 is above 0.7; the rest is near a half.
    assert (ones == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert (ones > 0.7).mean() == pytest.approx(0.5 * 0.3, abs=0.02)
    task = CopyTask()
    test = task.test_batch(generator, 200, (20,))
    assert (test.targets[test.mask.astype(bool)].any(-1) == 0).mean() == pytest.approx(1 / 256, abs=0.004)
    assert test.targets[test.mask.astype(bool)].mean() == pytest.approx(0.5, abs=0.01)


def test_hard_sequences_are_mostly_blank_or_of_one_density_or_of_few_vectors():
    def share(batch, holds):
        shown = [targets[mask > 0] for _, targets, mask in rows(batch) if mask.sum() >= 10]
        return np.mean([holds(vectors) for vectors in shown])

    task, kinds = CopyTask(), {}
    for name, draw in (("training", task.training_batch), ("hard", task.hard_batch)):
        batch = draw(np.random.default_rng(3), 2000)
        kinds[name] = {
            "blank": share(batch, lambda vectors: (vectors.any(1) == 0).mean() > 0.5),
            "nearly all ones": share(batch, lambda vectors: vectors.mean() > 0.8),
            "few": share(batch, lambda vectors: len(np.unique(vectors, axis=0)) <= 3),
        }
    # A quarter of the sequences each, of which half are mostly blank and a fifth has a density above 0.8.
    assert max(kinds["training"].values()) < 0.01
    assert kinds["hard"]["few"] >= 0.25
    assert kinds["hard"]["nearly all ones"] >= 0.25 * 0.15
    assert kinds["hard"]["blank"] >= 0.25 * 0.45


def test_a_test_batch_has_the_length_asked_for():
    batch = CopyTask().test_batch(np.random.default_rng(0), 3, (7,))
    assert batch.inputs.shape == (3, 16, 10)
    assert (batch.mask.sum(1) == 7).all()


def test_validation_reaches_past_the_trained_lengths():
    task = CopyTask()
    lengths = task.validation_batch(np.random.default_rng(0), 30).mask.sum(1)
    assert lengths.min() == task.min_length
    assert lengths.max() == 6 * task.max_length
