"""Training of Neural Turing Machines and of the baselines that they are compared with."""

import os
import sys
import warnings

# TensorFlow reads it while it is imported. With oneDNN's operations 2.21 corrupts its heap now and then, which ends a
# run with a segmentation fault or an abort (docs/design.md, "oneDNN is off").
if "tensorflow" in sys.modules and "TF_ENABLE_ONEDNN_OPTS" not in os.environ:
    warnings.warn(
        "TensorFlow was imported with oneDNN's operations, with which 2.21 corrupts its memory; expected "
        "TF_ENABLE_ONEDNN_OPTS=0 in the environment, or training to be imported before keras and tensorflow",
        RuntimeWarning,
        stacklevel=2,
    )
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
