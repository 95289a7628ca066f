import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tests.training import zoo
from training.config import RunConfig
from training.export import ExportError, export_model
from training.exporting import portability

REPOSITORY = Path(__file__).resolve().parents[3]


def graph_of(function):
    return tf.function(function, input_signature=[tf.TensorSpec([None], tf.float32)]).get_concrete_function().graph


def test_operations_without_a_gpu_kernel_are_listed_those_in_loops_too():
    def in_loop(x):
        return tf.while_loop(
            lambda i, _: i < 3, lambda i, x: (i + 1, x + tf.strings.to_number(tf.as_string(x))), (0, x)
        )

    found = portability.without_gpu(graph_of(in_loop).as_graph_def())
    assert {line.split()[0] for line in found} == {"AsString", "StringToNumber"}
    assert not portability.without_gpu(graph_of(lambda x: tf.sqrt(x)).as_graph_def())


def test_operations_that_name_a_device_are_listed():
    def on_cpu(x):
        with tf.device("/CPU:0"):
            return tf.sqrt(x)

    assert [line.split()[0] for line in portability.pinned(graph_of(on_cpu).as_graph_def())] == ["Sqrt"]


def test_what_the_model_servers_do_not_know_is_listed():
    graph = graph_of(lambda x: tf.sqrt(x) + 1).as_graph_def()
    assert not portability.unknown_to_serving(graph)
    for node in graph.node:
        if node.op == "Sqrt":
            node.op = "SqrtOfTheFuture"
        if node.op == "AddV2":
            node.attr["of_the_future"].b = True
            node.attr["_a_note"].b = True
    found = portability.unknown_to_serving(graph)
    assert len(found) == 2
    assert found[0].startswith("SqrtOfTheFuture")
    assert found[1].startswith("AddV2's of_the_future")
    assert all(line.endswith("is unknown to TensorFlow 2.19.1") for line in found)


class _OnCpu(layers.Layer):
    def call(self, inputs):
        with tf.device("/CPU:0"):
            return ops.sqrt(ops.abs(inputs))

    def compute_output_shape(self, shape):
        return shape


def test_a_model_that_is_not_portable_is_not_exported(tmp_path):
    body = [layers.LSTM(3, return_sequences=True), layers.TimeDistributed(_OnCpu())]
    model = keras.Sequential([keras.Input((None, 2)), *body])
    with pytest.raises(ExportError, match=r"Sqrt \(.*\) is pinned to .*CPU:0"):
        export_model(model, tmp_path, name="m")
    assert not list((tmp_path / "m").iterdir())


def test_a_run_is_exported_afterwards_by_a_command_whatever_keras_runs_on(tmp_path):
    run, config = tmp_path / "run", RunConfig(seed=5)
    run.mkdir()
    config.save(run)
    model = zoo.make("ntm")
    model.save(run / "best.keras")
    command = [sys.executable, "-m", "training.exporting", str(run), "--export-dir", str(tmp_path / "models")]
    environment = {"KERAS_BACKEND": "jax", "PATH": "", "TF_CPP_MIN_LOG_LEVEL": "2"}

    def export(*more):
        return subprocess.run(
            [*command, *more], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    done = export("--name", "mine", "--version", "3")
    assert done.returncode == 0, done.stderr
    loaded = tf.saved_model.load(str(tmp_path / "models" / "mine" / "3"))
    description = json.loads(loaded.signatures["describe"]()["config"].numpy())
    assert description["task"] == "copy"
    assert RunConfig.from_json(description["provenance"]["config"]) == config
    inputs = np.ones((1, 4, zoo.INPUT_DIM), np.float32)
    came = loaded.signatures["serving_default"](inputs=tf.constant(inputs))["outputs"]
    np.testing.assert_allclose(came, model(inputs), rtol=0, atol=1e-5)
    again = export("--name", "mine", "--version", "3")
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


def test_a_directory_without_a_network_is_refused(tmp_path):
    from training.exporting.__main__ import main

    assert main([str(tmp_path)]) == 2
