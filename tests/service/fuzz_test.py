"""The short run of ``hostile.py``: the gateway answers or refuses each, and everybody else's session stays exact.

``NTM_FUZZ_MESSAGES=100000 pytest tests/service/fuzz_test.py`` is the long run.
"""

import os
from collections import Counter

from tests.service import hostile
from tests.service.gateway_process import gateway_process

MESSAGES = int(os.environ.get("NTM_FUZZ_MESSAGES", "1000"))
ATTACKS = 5


def test_hostile_clients_end_nothing_and_everybody_else_stays_exact(tmp_path):
    codes = Counter()
    with gateway_process(tmp_path / "port") as (process, port):
        hostile.attack(process, port, 1000, Counter())  # what is allocated once is allocated now
        resident = [hostile.settled_bytes(process)]
        # What the heap keeps at the most is reached after some attacks; a leak grows with each.
        while len(resident) <= ATTACKS and (len(resident) < 2 or resident[-1] > 1.1 * resident[-2]):
            assert hostile.attack(process, port, MESSAGES, codes) > 0
            resident.append(hostile.settled_bytes(process))
    assert sum(codes.values()) >= MESSAGES
    assert set(codes) <= hostile.EXPECTED
    assert resident[-1] <= 1.1 * resident[-2], f"resident {resident}, after {MESSAGES} messages more each"
