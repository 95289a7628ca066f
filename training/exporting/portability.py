"""Where an export runs: on any device, and on the release of TensorFlow that the model servers are built from."""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2

from training.exporting.stages import ExportError

# Made by scripts/serving_ops.py under the TensorFlow of the TensorFlow Serving in deploy/.
_LIST = Path(__file__).with_name("serving_ops.json")


def check_portable(signatures: Mapping[str, Any], directory: Path) -> None:
    """Refuses a SavedModel that a GPU or the model servers' TensorFlow could not run.

    Args:
        signatures: The functions that run a sequence, by name.
        directory: The SavedModel that was written of them.

    Raises:
        ExportError: the text lists the operations.
    """
    graphs = [function.get_concrete_function().graph.as_graph_def() for function in signatures.values()]
    found = sorted({line for graph in graphs for line in (*without_gpu(graph), *pinned(graph))})
    saved = saved_model_pb2.SavedModel.FromString((directory / "saved_model.pb").read_bytes())
    found += sorted({line for meta in saved.meta_graphs for line in unknown_to_serving(meta.graph_def)})
    if found:
        raise ExportError(f"the model cannot be served everywhere: {'; '.join(found)}")


def without_gpu(graph: Any) -> list[str]:
    """The operations of a ``GraphDef``, its functions' included, that no GPU has a kernel for."""
    known = _operations()
    return [
        f"{node.op} ({node.name}) has no GPU kernel"
        for node in _nodes(graph)
        if node.op in known and not known[node.op]["gpu"]
    ]


def pinned(graph: Any) -> list[str]:
    """The operations of a ``GraphDef`` that name a device."""
    return [f"{node.op} ({node.name}) is pinned to {node.device}" for node in _nodes(graph) if node.device]


def unknown_to_serving(graph: Any) -> list[str]:
    """The operations of a ``GraphDef``, and their attributes, that the model servers' TensorFlow does not know."""
    release, known = _release(), _operations()
    functions = {function.signature.name for function in graph.library.function}
    found = []
    for node in _nodes(graph):
        if node.op in functions:
            continue
        if node.op not in known:
            found.append(f"{node.op} ({node.name}) is unknown to TensorFlow {release}")
            continue
        # What begins with an underscore is a note between the makers of a graph: a runtime passes over it.
        new = {name for name in node.attr if not name.startswith("_")} - set(known[node.op]["attributes"])
        found += [f"{node.op}'s {name} ({node.name}) is unknown to TensorFlow {release}" for name in sorted(new)]
    return found


def _nodes(graph: Any) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


@functools.cache
def _list() -> dict[str, Any]:
    listed: dict[str, Any] = json.loads(_LIST.read_text())
    return listed


def _release() -> str:
    return str(_list()["tensorflow"])


def _operations() -> dict[str, Any]:
    operations: dict[str, Any] = _list()["operations"]
    return operations
