"""What holds for the tests of the gateway."""

from hypothesis import Phase, settings

# For tests/mutants/run.py, which only wants to know whether a test fails: finding the shortest way there takes minutes.
settings.register_profile("no-shrinking", phases=[Phase.explicit, Phase.reuse, Phase.generate])
