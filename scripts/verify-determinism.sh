#!/bin/bash
# Verify that the simulation is deterministic: each of some seeds is run several times, in processes whose hashes differ, and all digests must
# be equal. Arguments: how many runs of each seed (3), then options of `isopod sim` (--scenario NAME ...).
set -euo pipefail
cd "$(dirname "$0")/.."
readonly ISOPOD=$PWD/.venv/bin/isopod
readonly SEEDS=(1 2 12345)

runs=3
if [[ ${1:-} =~ ^[0-9]+$ ]]; then runs=$1; shift; fi
[ "$runs" -ge 2 ] || { echo "verify-determinism: want at least 2 runs to compare" >&2; exit 2; }

before=
for seed in "${SEEDS[@]}"; do
    first=$("$ISOPOD" sim --digest --seed "$seed" "$@")
    for ((run = 2; run <= runs; run++)); do
        # The launcher isolates the interpreter, so every process draws a hash seed of its own.
        again=$("$ISOPOD" sim --digest --seed "$seed" "$@")
        if [ "$again" != "$first" ]; then
            echo "seed $seed: run $run differs: $again instead of $first" >&2
            exit 1
        fi
    done
    if [ "$first" = "$before" ]; then
        echo "seed $seed gives the same digest as the seed before it: the digest says nothing" >&2
        exit 1
    fi
    before=$first
    echo "seed $seed: $runs runs, one digest: $first"
done
