import pytest

from training.config import ModelConfig, Recipe, RunConfig


@pytest.fixture(scope="session")
def tiny():
    """A run of a few updates on a network of a few units, which passes through every phase: it 'learns' at once."""
    return RunConfig(
        task_options={"bits": 2, "max_length": 2},
        model=ModelConfig(units=5, n_slots=6, m_depth=3),
        recipe=Recipe(
            batch_size=2,
            training_slots=4,
            learned_below=10.0,
            settle_steps=6,
            attempts=2,
            chunk=2,
            validate_every=2,
            validation_size=4,
            examination_size=4,
            training_examination_size=4,
            compiled=False,
        ),
        seed=3,
    )
