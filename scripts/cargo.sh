#!/bin/bash
# Runs cargo on a crate below rust/, the core unless CRATE names another, with the toolchain that set-up chose:
# scripts/cargo.sh test --quiet; CRATE=guest scripts/cargo.sh test --quiet
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rust.sh
find_cargo || { echo "cargo $CARGO_VERSION_MIN or newer not found: run make setup" >&2; exit 1; }
cd "rust/${CRATE:-core}"
exec cargo "$@"
