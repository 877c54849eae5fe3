#!/bin/bash
# Runs cargo on the core's crate with the toolchain that set-up chose: scripts/cargo.sh test --quiet
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rust.sh
find_cargo || { echo "cargo $CARGO_VERSION_MIN or newer not found: run make setup" >&2; exit 1; }
cd rust/core
exec cargo "$@"
