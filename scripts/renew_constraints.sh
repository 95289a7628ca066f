#!/usr/bin/env bash
# scripts/renew_constraints.sh ENVIRONMENT: prints constraints.txt anew: names and versions of all that an environment
# has, and of what the extra `gpu` would bring beside it, which is CUDA and need not be installed for that.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report"' EXIT
head -n 1 constraints.txt
"$1/bin/pip" install --quiet --dry-run --report "$report" '.[gpu]'
{
  "$1/bin/pip" freeze --all --exclude pip --exclude-editable
  "$1/bin/python" - "$report" << 'END'
import json
import sys
from pathlib import Path

for package in json.loads(Path(sys.argv[1]).read_text())["install"]:
    if package["metadata"]["name"] != "ntm-serving":
        print(f"{package['metadata']['name']}=={package['metadata']['version']}")
END
} | sort --ignore-case
