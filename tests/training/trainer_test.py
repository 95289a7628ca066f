import keras
import numpy as np

from training.models import build_model
from training.step import Rates, Trainer


def test_a_network_goes_on_in_a_larger_memory_where_it_stood_in_the_small_one(tiny):
    task, noise = tiny.make_task(), keras.Variable(0.0, trainable=False)
    sizes = (task.input_dim, task.output_dim)
    small, large = (
        Trainer(build_model(tiny.model, *sizes, seed=seed, slots=slots, noise=noise), tiny.recipe, noise)
        for seed, slots in ((1, 4), (2, None))
    )
    generator = np.random.default_rng(0)
    batches = [task.training_batch(generator, 2) for _ in range(2)]
    small.run(batches, Rates(1e-2, 1.0, 0.1))
    large.take(small)
    assert large.model.get_layer("ntm").cell.n_slots == tiny.model.n_slots
    for taken, kept in zip(large.variables, small.variables, strict=True):
        assert np.array_equal(taken, kept)
    large.run(batches, Rates(1e-2, 1.0, 0.1))
    assert any((a != b).any() for a, b in zip(large.average, small.average, strict=True))
