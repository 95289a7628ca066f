import re
from pathlib import Path

from ntm_serving.v1 import model_service_pb2, sequence_service_pb2
from service.errors import ServiceError
from service.status import STATUS_OF

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
ROWS = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+)", TEXT, re.MULTILINE))


def test_the_page_has_every_reason_with_its_status_and_no_other():
    table = {kind.reason: code.name for kind, code in STATUS_OF.items()}
    assert {**table, ServiceError.reason: "INTERNAL"} == ROWS


def test_the_page_has_every_method():
    for module in (sequence_service_pb2, model_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert f"`{method.name}`" in TEXT
