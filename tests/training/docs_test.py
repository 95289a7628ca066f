import re
from pathlib import Path

import keras
import numpy as np

from training import train
from training.exporting.__main__ import parser as export_parser

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_introductions_example_runs_and_trains(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "ntm.md").read_text(), re.S)
    names = {"__name__": "docs"}
    exec(compile(snippet, "ntm.md", "exec"), names)
    assert capsys.readouterr().out == f"{names['seen'].write.weightings.shape}\n"
    assert names["seen"].write.weightings.shape == (1, names["task"].max_time, 1, 16)
    assert np.isfinite(names["model"].history.history["loss"]).all()
    assert isinstance(names["model"], keras.Sequential)


def test_every_picture_of_the_introduction_is_there():
    pictures = re.findall(r"\]\((images/[^)]+)\)", (DOCS / "ntm.md").read_text())
    assert len(pictures) == 3
    assert not [picture for picture in pictures if not (DOCS / picture).is_file()]


def test_every_option_that_is_documented_exists():
    known = train.parser().format_help() + export_parser().format_help()
    options = set(re.findall(r"`?(--[a-z][a-z-]+)", (DOCS / "training.md").read_text())) - {"--help", "--logdir"}
    assert len(options) > 8
    assert not [option for option in options if option not in known]
