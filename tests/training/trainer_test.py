import dataclasses
import math

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


def test_rates_that_are_whole_numbers_are_as_good_as_any(tiny):
    recipe = dataclasses.replace(tiny.recipe, clip_norm=1, learning_rate=1, epsilon=1, beta_2=0)
    task, noise = tiny.make_task(), keras.Variable(0.0, trainable=False)
    trainer = Trainer(build_model(tiny.model, task.input_dim, task.output_dim, seed=1, noise=noise), recipe, noise)
    batches = [task.training_batch(np.random.default_rng(0), 2) for _ in range(2)]
    progress = trainer.run(batches, Rates(recipe.learning_rate, recipe.clip_norm, 1))
    assert math.isfinite(progress.nats_per_bit)
    assert trainer.finite
