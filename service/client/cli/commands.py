"""The commands of ``ntm-client``: each a function of the client, the options and the output."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from service.client.blocking import SequenceClient, Session
from service.client.cli import bench, picture
from service.client.cli.data import DataError, read_sequence, write_sequence
from service.client.cli.output import Output
from service.client.values import SessionInfo

_SESSION_COLUMNS = ("session_id", "model", "version", "position", "last_used", "expires")
_VERSION_COLUMNS = ("model", "version", "state", "input_dim", "output_dim", "state_size", "task", "session_count")


def models(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """What is served."""
    found = [client.model(options.name)] if options.name else client.models()
    rows = [
        {"model": model.name, **_version_row(dataclasses.asdict(version))}
        for model in found
        for version in model.versions
    ]
    output.table(rows, _VERSION_COLUMNS)
    if options.name and not output.as_json:
        output.table(rows[0]["state_layout"], ("name", "shape", "axes"))


def sessions(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """The caller's sessions."""
    output.table([dataclasses.asdict(info) for info in client.sessions(page_size=1000)], _SESSION_COLUMNS)


def open_session(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """Opens a session and leaves it there."""
    _tell(client.create_session(options.model, version=options.version, ttl=options.ttl).info(), output)


def delete(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """Ends a session."""
    client.attach(options.session, position=0).close()
    output.record({"deleted": options.session})


def step(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """Feeds a sequence to a session, in chunks, and prints or saves the outputs."""
    if (options.session is None) == (options.model is None):
        raise DataError("expected either --session ID to go on with one, or --model NAME to open one")
    inputs = read_sequence(options.inputs)
    session = client.create_session(options.model) if options.model else _attach(client, options)
    try:
        size = options.chunk or len(inputs)
        outputs = np.concatenate([session.step(inputs[begin : begin + size]) for begin in range(0, len(inputs), size)])
    finally:
        if options.model and not options.keep:
            session.close()
    result: dict[str, Any] = {"session_id": session.session_id, "position": session.position}
    if options.output:
        write_sequence(outputs, options.output)
    if output.as_json:
        output.document({**result, "outputs": outputs})
    elif options.output is None:
        write_sequence(outputs, "-")
    elif options.output != "-":
        output.record({**result, "outputs": f"{outputs.shape[0]} x {outputs.shape[1]} in {options.output}"})


def inspect(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """The state of a session by name."""
    session = client.attach(options.session)
    state = session.inspect()
    if options.save:
        arrays: dict[str, Any] = {name.replace("/", "."): value for name, value in state.items()}
        np.savez(options.save, **arrays)
    if options.picture:
        title = f"session {session.session_id} at position {session.position}"
        picture.save(state, _axes_of(client, session.info()), title, options.picture)
    if output.as_json:
        output.document({"session_id": session.session_id, "position": session.position, "state": state})
        return
    rows = [
        {"name": name, "shape": value.shape, "min": float(value.min()), "mean": float(value.mean())}
        | {"max": float(value.max())}
        for name, value in state.items()
    ]
    output.table(rows, ("name", "shape", "min", "mean", "max"))
    for path in (options.save, options.picture):
        if path:
            output.say(f"saved {path}")


def fork(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """A second session that goes on from the same place."""
    _tell(client.attach(options.session, position=0).fork(ttl=options.ttl).info(), output)


def snapshot(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """Saves a session to a file."""
    blob = client.attach(options.session, position=0).snapshot()
    options.file.write_bytes(blob)
    output.record({"session_id": options.session, "bytes": len(blob), "file": str(options.file)})


def restore(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """A new session from a file that ``snapshot`` saved."""
    _tell(client.restore(options.file.read_bytes(), ttl=options.ttl).info(), output)


def run_bench(client: SequenceClient, options: argparse.Namespace, output: Output) -> None:
    """Steps many sessions for some seconds, and says how fast it went."""
    output.record(
        bench.run(
            client, options.model, sessions=options.sessions, time_steps=options.time_steps, seconds=options.seconds
        )
    )


def add_to(parsers: Any) -> None:
    """Adds all commands to the parser."""
    command = _add(parsers, "models", models)
    command.add_argument("name", nargs="?", help="one model only, with its state layout")
    _add(parsers, "sessions", sessions)
    command = _add(parsers, "open", open_session)
    command.add_argument("model")
    command.add_argument("--version", type=int, help="default: the newest")
    _add_ttl(command)
    _add(parsers, "delete", delete).add_argument("session")
    _add_step(parsers)
    command = _add(parsers, "inspect", inspect)
    command.add_argument("session")
    command.add_argument("--picture", type=Path, help="draw it into this file (PNG, PDF, SVG); needs matplotlib")
    command.add_argument("--save", type=Path, help="save the arrays into this .npz file")
    command = _add(parsers, "fork", fork)
    command.add_argument("session")
    _add_ttl(command)
    command = _add(parsers, "snapshot", snapshot)
    command.add_argument("session")
    command.add_argument("file", type=Path)
    command = _add(parsers, "restore", restore)
    command.add_argument("file", type=Path)
    _add_ttl(command)
    command = _add(parsers, "bench", run_bench)
    command.add_argument("--model", required=True)
    command.add_argument("--sessions", type=int, default=64, help="stepped at once (default: %(default)s)")
    command.add_argument("--time-steps", type=int, default=1, help="of each step's chunk (default: %(default)s)")
    command.add_argument("--seconds", type=float, default=5, help="default: %(default)s")


def _add(parsers: Any, name: str, run: Any) -> argparse.ArgumentParser:
    text = str(run.__doc__).splitlines()[0]
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=text, description=text)
    # Before the command or behind it: what is left out here must not undo what was said there.
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for programs")
    parser.set_defaults(run=run)
    return parser


def _add_step(parsers: Any) -> None:
    command = _add(parsers, "step", step)
    command.add_argument("inputs", help="a .npy file, a CSV file, or - for CSV on standard input; a row is a time step")
    command.add_argument("--model", help="open a session of this model, and delete it afterwards")
    command.add_argument("--session", help="go on with this session")
    command.add_argument("--position", type=int, help="where the session stands; default: asks the gateway")
    command.add_argument("--chunk", type=int, help="time steps sent at once; default: all")
    command.add_argument("--output", help="a .npy or CSV file for the outputs; default: CSV on standard output")
    command.add_argument("--keep", action="store_true", help="with --model: leave the session there")


def _add_ttl(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ttl", type=float, help="seconds that it lives past its last step; default: the gateway's")


def _attach(client: SequenceClient, options: argparse.Namespace) -> Session:
    return client.attach(options.session, position=options.position)


def _tell(info: SessionInfo, output: Output) -> None:
    output.record(dataclasses.asdict(info))


def _axes_of(client: SequenceClient, info: SessionInfo) -> dict[str, tuple[str, ...]]:
    """What the axes of each component of a session's state count."""
    for version in client.model(info.model).versions:
        if version.version == info.version:
            return {part.name: part.axes for part in version.state_layout}
    return {}


def _version_row(version: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in version.items() if name != "keras_config_json"}
