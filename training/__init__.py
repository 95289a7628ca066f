"""Training of Neural Turing Machines and of the baselines that they are compared with."""
