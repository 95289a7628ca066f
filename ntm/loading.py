"""`ntm.load`: a live Keras model out of an exported version."""

from pathlib import Path

import keras

MODEL_FILE = Path("assets.extra", "model.keras")


def load(path):
    """Rebuilds the Keras model, weights included, that a served version was exported from; on any backend.

    It is loaded in Keras's safe mode: a file that carries code of its own is refused.

    Args:
        path: the directory of a version (``models/copy/1``), or of a model (``models/copy``) for its newest version.

    Returns:
        The model, not compiled.

    Raises:
        FileNotFoundError: there is no exported model.
    """
    path = Path(path)
    directory = path if (path / MODEL_FILE).is_file() else _newest_version(path)
    return keras.saving.load_model(directory / MODEL_FILE, compile=False, safe_mode=True)


def _newest_version(path):
    children = path.iterdir() if path.is_dir() else ()
    versions = [child for child in children if child.name.isdecimal() and (child / MODEL_FILE).is_file()]
    if not versions:
        raise FileNotFoundError(
            f"{path} is not an exported model: expected {MODEL_FILE.as_posix()} in it, or in a version below it"
        )
    return max(versions, key=lambda version: int(version.name))
