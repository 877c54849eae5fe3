#!/bin/bash
# Show what determinism means: the same seed twice gives the same history, line by line; another seed gives another one.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly ISOPOD=$PWD/.venv/bin/isopod
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

options=(--scenario crashes --until 3s "$@")
"$ISOPOD" sim --seed 7 "${options[@]}" --trace "$folder/first" --digest
"$ISOPOD" sim --seed 7 "${options[@]}" --trace "$folder/second" --digest
"$ISOPOD" sim --seed 8 "${options[@]}" --trace "$folder/third" --digest

cmp "$folder/first" "$folder/second"
echo "seed 7 twice: $(wc -l <"$folder/first") lines, every one equal"
if cmp -s "$folder/first" "$folder/third"; then
    echo "seed 8: the same, which must not be" >&2
    exit 1
fi
echo "seed 8: another history. The first lines of seed 7:"
head -n 12 "$folder/first"
