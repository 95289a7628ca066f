import pytest

from training.checks import ConfigError
from training.presets import preset
from training.tasks import TASKS


@pytest.mark.parametrize(
    ("task", "model", "heads", "units"),
    [("copy", "ntm", 1, 100), ("associative-recall", "ntm", 4, 256), ("priority-sort", "ntm-lstm", 5, 100)],
)
def test_the_networks_have_the_sizes_of_the_paper(task, model, heads, units):
    for name in ("quick", "paper"):
        found = preset(name, task=task, model=model).model
        assert (found.heads, found.units, found.n_slots, found.m_depth) == (heads, units, 128, 20)


@pytest.mark.parametrize("task", TASKS)
def test_quick_trains_the_ntm_on_each_task_in_its_own_way_and_paper_at_the_rate_of_the_paper(task):
    recipes = {name: preset("quick", task=name, model="ntm-lstm").recipe for name in TASKS}
    assert [other for other in TASKS if recipes[other] == recipes[task]] == [task]
    assert preset("paper", task=task).recipe.learning_rate == (3e-5 if task in ("ngrams", "priority-sort") else 1e-4)


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match=r"task should be one of copy, .*; received 'sort'"):
        preset("quick", task="sort")
