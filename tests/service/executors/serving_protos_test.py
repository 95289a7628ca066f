"""TensorFlow's generated messages, without TensorFlow and beside it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc


def test_nothing_of_tensorflow_is_imported_and_nothing_stands_in_its_way() -> None:
    """In a process of its own: first without TensorFlow, then with it, whose message classes are the same."""
    script = """
        import sys
        import service.executors.tf_serving
        from service.executors import serving_protos
        left = {name for name in sys.modules if name.split(".")[0] == "tensorflow" and not name.endswith("_pb2")}
        assert not left, left
        import tensorflow as tf
        from tensorflow.core.framework import tensor_pb2
        assert tensor_pb2.TensorProto is serving_protos.tensor_pb2.TensorProto
        proto = tf.make_tensor_proto([1.0, 2.0])
        assert isinstance(proto, serving_protos.tensor_pb2.TensorProto)
        assert tf.constant(3) + 4 == 7
        """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def test_tensorflows_generated_modules_are_all_that_is_needed(tmp_path: Path) -> None:
    """As in a gateway image: the other packages, and of TensorFlow the ``*_pb2.py`` files alone."""
    packages = Path(grpc.__file__).parents[1]
    for package in packages.iterdir():
        if not package.name.startswith(("tensorflow-", "keras", "jax", "torch")) and package.name != "tensorflow":
            (tmp_path / package.name).symlink_to(package)
    for file in (packages / "tensorflow").rglob("*_pb2.py"):
        copy = tmp_path / file.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    script = """
        import sys
        import service.executors.tf_serving as executor
        assert "tensorflow" not in sys.modules
        import tensorflow
        print(tensorflow.__file__, hasattr(tensorflow, "constant"))
        """
    root = Path(__file__).parents[3]
    command = [sys.executable, "-S", "-P", "-c", textwrap.dedent(script)]
    environment = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "protos"), str(tmp_path)])}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout) == (0, "None False\n"), finished.stderr


def test_where_tensorflow_is_there_already_its_own_messages_are_used() -> None:
    import tensorflow as tf
    from tensorflow.core.framework import tensor_pb2

    from service.executors import serving_protos

    assert serving_protos.tensor_pb2.TensorProto is tensor_pb2.TensorProto
    assert sys.modules["tensorflow"] is tf
