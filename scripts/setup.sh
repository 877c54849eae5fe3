#!/bin/bash
# Set-up: makes a fresh Debian 12 machine able to build, run and test isopod. Safe to repeat, and quick when all is there.
#
# With --tests it also installs what only tests use: independent peers (curl, a headless browser, erofs-utils, nix, containerd, Prometheus).
# Five steps, each skipped when its result is in place: Debian packages, the virtual environment (exactly the versions of
# requirements.lock), the descriptors of the gRPC protocol, the Rust core, the launcher .venv/bin/isopod. Rules: apt-get only for what is missing; the package lists are
# fetched only when they do not know a package or are too old to install it; no step needs a terminal.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly ROOT=$PWD
readonly STAMP=.venv/setup.stamp
readonly CORE_STAMP=build/core.stamp
readonly PROTOCOL=src/isopod/faces/grpc/blixard.binpb
readonly CRI=src/isopod/pulse/cri.binpb
. scripts/rust.sh

# What a node needs, and what building and testing it needs.
readonly PACKAGES=(
    ca-certificates python3 python3-venv gcc libc6-dev protobuf-compiler
    crun runc conmon busybox-static nftables iproute2 golang-github-containers-common
)
readonly TEST_PACKAGES=(curl chromium-headless-shell erofs-utils nix-bin containerd containernetworking-plugins prometheus)

say() { printf 'set-up: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

missing_packages() {
    local installed package
    installed=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^ii  *//p') || true
    for package in "$@"; do
        grep -qxF "$package" <<<"$installed" || printf '%s ' "$package"
    done
}

install_packages() {
    local missing
    missing=$(missing_packages "$@")
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "apt-get not found: isopod's set-up knows Debian 12; install by hand: $missing"
    [ "$(id -u)" = 0 ] || fail "not root: cannot install $missing- run this once as root, or: apt-get install $missing"
    say "installing Debian packages: $missing"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # a list of package names
    apt-cache show $missing >/dev/null 2>&1 || apt-get update -qq
    # A known package may have been replaced in the archive since the lists were fetched: then fetch them and install the new one.
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
        fail "apt-get could not install: $missing"
}

ensure_rust() {
    find_cargo && return
    install_packages rustc-web cargo-web
    find_cargo || fail "no cargo $CARGO_VERSION_MIN or newer after installing rustc-web and cargo-web: $(cargo --version 2>&1)"
}

ensure_environment() {
    local want
    want=$({ echo "$ROOT"; /usr/bin/python3 --version; cat requirements.lock scripts/setup.sh; } | sha256sum)
    if [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$want" ]; then return; fi
    say "filling the virtual environment"
    [ -x .venv/bin/pip ] || /usr/bin/python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
    write_launcher
    printf '%s\n' "$want" >"$STAMP"
}

# The launcher starts an interpreter that imports nothing by itself (-I -S): that is most of a short command's time.
# The package is found in src; the commands that need libraries add site-packages themselves.
write_launcher() {
    local site
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$ROOT/src" >"$site/isopod.pth"
    cat >.venv/bin/isopod.new <<LAUNCHER
#!$ROOT/.venv/bin/python -IS
import sys
sys.path.insert(0, "$ROOT/src")
from isopod.cli.main import main
words = ["pulse"] if sys.argv[0].rpartition("/")[2] == "kata-pulse" else []
sys.exit(main([*words, *sys.argv[1:]], site_packages="$site"))
LAUNCHER
    chmod 755 .venv/bin/isopod.new
    mv .venv/bin/isopod.new .venv/bin/isopod
    ln -sf isopod .venv/bin/kata-pulse  # the name by which other people's scripts call the metrics agent
}

# The descriptors of the gRPC protocols, each beside the package that speaks it: ours, which is served, and the part of the CRI that is called.
ensure_protocol() {
    compile_protocol "$PROTOCOL" proto blixard.proto blixard_raft.proto
    compile_protocol "$CRI" proto/cri cri.proto
}

compile_protocol() {
    local target=$1 folder=$2
    shift 2
    if [ -e "$target" ] && [ -z "$(find "$folder" -maxdepth 1 -name '*.proto' -newer "$target")" ]; then return; fi
    say "compiling the gRPC protocol of $folder"
    protoc --proto_path="$folder" --include_imports --descriptor_set_out="$target" "$@"
}

ensure_core() {
    local want
    want=$({ .venv/bin/python --version; find rust -name target -prune -o -type f \( -name '*.rs' -o -name 'Cargo.*' \) -print0 |
        sort -z | xargs -0 sha256sum; } | sha256sum)
    if [ -e src/isopod/_core.abi3.so ] && [ -e "$CORE_STAMP" ] && [ "$(cat "$CORE_STAMP")" = "$want" ]; then return; fi
    ensure_rust
    say "building the Rust core (a few minutes the first time)"
    if ! VIRTUAL_ENV=$ROOT/.venv .venv/bin/maturin develop --release --locked --skip-install --quiet >build/core.log 2>&1; then
        cat build/core.log >&2
        fail "the Rust core did not build"
    fi
    printf '%s\n' "$want" >"$CORE_STAMP"
}

mkdir -p build
exec 9>build/setup.lock
flock 9
case "${1-}" in
    "") install_packages "${PACKAGES[@]}" ;;
    --tests) install_packages "${PACKAGES[@]}" "${TEST_PACKAGES[@]}" ;;
    *) fail "unknown argument: $1" ;;
esac
ensure_environment
ensure_protocol
ensure_core
