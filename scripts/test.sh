#!/usr/bin/env bash
# Lint and all tests, in less than five minutes on 2 idle cores. `--all` adds the long ones; other
# arguments go to pytest.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"               # two workers, each with a core of its own
ruff check .
if [ "${1:-}" = --all ]; then
    shift
    set -- --run-long "$@"
fi
# the files of tests that passed, gigabytes, are deleted
exec python -m pytest -q -n 2 --dist worksteal -o tmp_path_retention_policy=failed tests "$@"
