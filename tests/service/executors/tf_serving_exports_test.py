"""Exported models stepped through a model server give what they give on whole sequences; the control does not."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from service.executors.tf_serving import TfServingExecutor
from service.types import FloatArray, VersionKey
from tests.service.executors import stepping
from tests.service.model_server.processes import ModelServer, running_model_server
from tests.training import zoo
from training.export import export_model

NAMES = ("ntm", "ntm-lstm-heads", "lstm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exports")
    for name in NAMES:
        export_model(zoo.make(name), directory, name=name, task="none")
    return directory


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with running_model_server(models, tmp_path_factory.mktemp("server"), "--no-enable-model-warmup") as process:
        yield process


@pytest.mark.parametrize("name", NAMES)
async def test_any_chunks_in_any_batches_give_the_whole(server: ModelServer, models: Path, name: str) -> None:
    loaded = tf.saved_model.load(str(models / name / "1"))

    def whole(inputs: FloatArray) -> FloatArray:
        return loaded.signatures["serving_default"](inputs=tf.constant(inputs))["outputs"].numpy()

    key = VersionKey(name, 1)
    sequences = stepping.random_sequences(12, 30, zoo.INPUT_DIM)
    wanted = [whole(sequence[None])[0] for sequence in sequences]
    tolerance = stepping.tolerance(whole, zoo.INPUT_DIM)
    executor = TfServingExecutor(server.address, models=NAMES)
    await executor.start()
    try:
        size = executor.versions()[key].state_size

        async def stepped(seed: int = 0, fault: str = "") -> list[FloatArray]:
            plan = stepping.batches(sequences, size, seed, fault)
            return await stepping.run_async(lambda batch: executor.step(key, batch), plan)

        for outputs in await asyncio.gather(*(stepped(seed) for seed in range(4))):
            assert stepping.difference(outputs, wanted) <= tolerance
        for fault in stepping.FAULTS:
            assert stepping.difference(await stepped(fault=fault), wanted) > 100 * tolerance, fault
    finally:
        await executor.close()
