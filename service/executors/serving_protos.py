"""TensorFlow Serving's messages, without TensorFlow.

``tensorflow-serving-api``'s generated modules import TensorFlow's generated ones (``tensorflow.core.framework...``),
which need nothing but protobuf. Importing them the plain way runs ``tensorflow/__init__.py`` first where the whole
package is installed: five seconds and 400 MB for a client that only sends messages. So a bare package stands in for
``tensorflow`` while they are imported, and goes away again: a later ``import tensorflow`` finds nothing of it, and uses
the very same message classes. Where TensorFlow has been imported already, its modules are used as they are. It is
enough that TensorFlow's ``*_pb2.py`` files are there; nothing else of it needs to be installed.
"""

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_PACKAGE = "tensorflow"
_GENERATED = "_pb2"
_lock = threading.Lock()


@contextlib.contextmanager
def _bare_tensorflow() -> Iterator[None]:
    """While this holds, ``tensorflow`` is a package that runs nothing; one that is there already is left alone."""
    if _PACKAGE in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(_PACKAGE)  # finds a top-level package, runs nothing of it
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(
            "TensorFlow's generated protobuf modules (tensorflow/core/**/*_pb2.py) are not installed: install "
            "tensorflow, or put just these files beside tensorflow-serving-api",
            name=_PACKAGE,
        )
    with _lock:
        bare = ModuleType(_PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        sys.modules[_PACKAGE] = bare
        try:
            yield
        finally:
            for name in list(sys.modules):
                # The generated modules stay: message types are registered once for a process.
                if (name == _PACKAGE or name.startswith(f"{_PACKAGE}.")) and not name.endswith(_GENERATED):
                    del sys.modules[name]


def _import(name: str) -> Any:
    return importlib.import_module(name)


with _bare_tensorflow():
    predict_pb2 = _import("tensorflow_serving.apis.predict_pb2")
    get_model_status_pb2 = _import("tensorflow_serving.apis.get_model_status_pb2")
    tensor_pb2 = _import("tensorflow.core.framework.tensor_pb2")
    tensor_shape_pb2 = _import("tensorflow.core.framework.tensor_shape_pb2")
    types_pb2 = _import("tensorflow.core.framework.types_pb2")
