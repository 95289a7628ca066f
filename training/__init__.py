"""Training of Neural Turing Machines and of the baselines that they are compared with."""

import os

# TensorFlow reads it while it is imported. With oneDNN's operations 2.21 corrupts its heap now and then, which ends a
# run with a segmentation fault or an abort (docs/design.md, "oneDNN is off").
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
