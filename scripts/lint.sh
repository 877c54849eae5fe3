#!/bin/bash
# Every check that needs no running of isopod. All are run, so that one round shows everything; the exit code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH=src MYPYPATH=src
failed=()

check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        printf 'ok      %s\n' "$name"
    else
        printf '%s\nFAILED  %s: %s\n' "$output" "$name" "$*"
        failed+=("$name")
    fi
}

# Debian ships rustfmt apart from the compiler and no clippy for it: what is not there is named, not passed.
check_rust() {
    local name=$1
    shift
    if scripts/cargo.sh "$1" --version >/dev/null 2>&1; then
        check "$name" scripts/cargo.sh "$@"
    else
        printf 'absent  %s: this toolchain has no cargo %s\n' "$name" "$1"
    fi
}

check_shell() {
    local script
    for script in scripts/*.sh deploy/pulse/*.sh .ci/run; do bash -n "$script" || return 1; done
}

check "format" ruff format --check --quiet .
check "style and bans" ruff check --quiet --output-format concise .
check "types" mypy
check "floors" lint-imports --no-logo --cache-dir build/import_linter
check "core's stubs" python -m mypy.stubtest --concise isopod._core
check "shell scripts" check_shell
for CRATE in core guest; do
    export CRATE
    check_rust "Rust format: $CRATE" fmt --check
    check_rust "Rust style: $CRATE" clippy --quiet --all-targets -- --deny warnings
done
check "rows" python -m scripts.rows --quiet
check "generated documents" python -m scripts.docs --check
check "API reference" python -m scripts.reference --check

if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: %d of the checks failed: %s\n' "${#failed[@]}" "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
echo "lint: all passed"
