#!/bin/bash
# Run the simulation suite: every scenario with some seeds. More seeds: scripts/sim-test.sh 1..100; other options are handed on.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly ISOPOD=$PWD/.venv/bin/isopod

seeds=1..3
if [[ ${1:-} =~ ^[0-9]+\.\.[0-9]+$ ]]; then seeds=$1; shift; fi
exec "$ISOPOD" sim --scenario all --seeds "$seeds" "$@"
