"""Prints docs/settings.md: ``python scripts/settings_doc.py > docs/settings.md``. A test holds the page to it."""

import types
import typing

from pydantic.fields import FieldInfo

from service.config import Settings

_HEAD = """\
# Settings

Every setting of `ntm-serve`, in the order of `ntm-serve --help`. Each is a flag, an environment variable and a key of
the TOML file that `--config` (or `NTM_CONFIG`) names; a flag wins over the environment, and that over the file. They
are checked at start; an error names the setting. `ntm-serve --check` prints what it would run with, passwords left
out, and starts nothing.

```
ntm-serve --model-dir models --max-sessions 5000
NTM_MODEL_DIR=models NTM_MAX_SESSIONS=5000 ntm-serve
printf 'model_dir = "models"\\nmax_sessions = 5000\\n' > gateway.toml; ntm-serve --config gateway.toml
```

A switch has a negative form (`--no-xla`), and takes `true` or `false` elsewhere. Several models: `--model a --model b`,
`NTM_MODEL='["a", "b"]'`, `model = ["a", "b"]`. What one principal may do stands in the token file (`--token-file`).

| flag | environment | file | default | |
|---|---|---|---|---|
"""
_FOOT = """
This page is made of `service/config.py` by `python scripts/settings_doc.py`.
"""


def page() -> str:
    """The whole page."""
    rows = [_row(name, field) for name, field in Settings.model_fields.items()]
    return _HEAD + "\n".join(rows) + "\n" + _FOOT


def _row(name: str, field: FieldInfo) -> str:
    flag = f"`--{name.replace('_', '-')}`"
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    # A switch of the command line alone is none of a file or an environment.
    if name in {"check", "config"}:
        environment, key = ("`NTM_CONFIG`" if name == "config" else ""), ""
    else:
        environment, key = f"`NTM_{name.upper()}`", f"`{name}`"
    return f"| {flag} | {environment} | {key} | {_default(field)} | {text}{_choices(field)} |"


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None or value in ("", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _choices(field: FieldInfo) -> str:
    kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
    choices = [value for kind in kinds if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)]
    bounds = [f"{sign} {limit}" for sign, limit in _bounds(field)]
    return (
        f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        if choices
        else f" ({', '.join(bounds)})" * bool(bounds)
    )


def _bounds(field: FieldInfo) -> list[tuple[str, object]]:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        (sign, getattr(constraint, name))
        for constraint in field.metadata
        for name, sign in signs.items()
        if getattr(constraint, name, None) is not None
    ]


if __name__ == "__main__":
    print(page(), end="")
