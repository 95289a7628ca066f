"""docs/settings.md is what the settings are."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_up_to_date():
    made = subprocess.run(
        [sys.executable, "scripts/settings_doc.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == made.stdout, "run: python scripts/settings_doc.py > docs/settings.md"
