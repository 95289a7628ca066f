"""What holds for every test."""

import os

# TensorFlow reads it while it is imported; without it a test run ends in a segmentation fault now and then
# (docs/design.md, "oneDNN is off"). A copy for the processes that tests start comes with the environment.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
