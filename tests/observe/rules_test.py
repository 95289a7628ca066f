import json
import re
import subprocess

import pytest

from service.auth import TokenFile
from tests.observe.prometheus import ALERTS, DEPLOY, needs_prometheus
from tests.observe.scrape import scrape
from tests.service.support import random_inputs, running_gateway, step_request

ALERT_NAMES = re.findall(r"^ *- alert: (\w+)$", ALERTS.read_text(), re.MULTILINE)
MANUAL = (DEPLOY.parent / "docs" / "operations.md").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "gateway.json").read_text())


@needs_prometheus
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments):
    done = subprocess.run(
        ["promtool", *arguments], cwd=ALERTS.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_shown_not_to_fire_yet_to_fire_and_to_end():
    cases = (DEPLOY / "prometheus" / "alerts_test.yml").read_text().split("  - name: ")[1:]
    assert [case.split("\n")[0] for case in cases] == ALERT_NAMES
    for case in cases:
        outcomes = re.findall(r"exp_alerts: ?(\[\])?\n", case)
        assert outcomes == ["[]", "", "[]"]
        times = [int(minutes) for minutes in re.findall(r"eval_time: (\d+)m\n", case)]
        assert times == sorted(times)


def test_the_dashboard_is_one_that_grafana_takes():
    """Unique ids and letters, panels that do not overlap, queries of the data source that can be chosen."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
        if panel["type"] == "row":
            continue
        targets = panel["targets"]
        assert len({target["refId"] for target in targets}) == len(targets)
        assert all(target["datasource"]["uid"] == "${datasource}" for target in targets)
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"]
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance", "model"}


def test_the_runbook_has_a_section_for_each_alert_and_none_besides():
    assert sorted(re.findall(r"^### (Ntm\w+)$", MANUAL, re.MULTILINE)) == sorted(ALERT_NAMES)
    anchors = re.findall(r"runbook_url: \S+/docs/operations\.md#(\w+)$", ALERTS.read_text(), re.MULTILINE)
    assert anchors == [name.lower() for name in ALERT_NAMES]


async def test_each_metric_is_documented_and_each_that_is_documented_is_there():
    rows = [line for line in MANUAL.splitlines() if line.startswith("| `ntm_")]
    documented = {name for row in rows for name in re.findall(r"`(ntm_\w+)`", row.split("|")[1])}
    async with running_gateway(metrics_listen="127.0.0.1:0") as running:
        await running.create("a")
        await running.stub.Step(step_request("a", random_inputs(1), 0))
        now = await scrape(running.gateway.monitor.port)
    there = {name + ("_total" if family.type == "counter" else "") for name, family in now.families.items()}
    assert {name for name in there if name.startswith("ntm_")} == documented


def test_the_token_file_of_the_manual_is_one(tmp_path):
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", MANUAL, re.MULTILINE | re.DOTALL)
    path = tmp_path / "tokens.toml"
    path.write_text(shown)
    principal = TokenFile(path).caller("Bearer test", None)()
    assert (principal.name, principal.models) == ("alice", {"copy"})
    assert (principal.max_sessions, principal.max_queued_steps) == (100, 256)
