"""The mutants are of the sources as they are; whether each is caught is for ``make test-mutants`` to say."""

import pytest

from tests.mutants.run import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_stands_in_the_sources_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.before) == 1
    path, _, name = mutant.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()
