#!/bin/bash
# What microVMs boot, written to .venv/share/isopod/guest: Debian's kernel as `vmlinux`, the memory file system `initrd.img` with the agent
# in it, `isopod-shim` for the host, and `guest.json` that says what they are.
#
# Safe to repeat, and quick when nothing changed: the folder carries the digest of what it was made from. It is replaced as a whole, by a
# rename, so that a machine never boots half of it. `scripts/guest.sh FOLDER` writes elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
say_as=guest
. scripts/debian.sh
. scripts/rust.sh
readonly TARGET=x86_64-unknown-linux-gnu
readonly CRATE=rust/guest
readonly PLACE=${1:-.venv/share/isopod/guest}
readonly BUILT=${CARGO_TARGET_DIR:-$CRATE/target}/$TARGET/release

# Rust's own flags make the binaries static; a linker's table of places to patch is then of no use.
build_binaries() {
    find_cargo || fail "no cargo $CARGO_VERSION_MIN or newer: run make setup"
    say "building the agent and the shim (a minute the first time)"
    if ! (cd $CRATE && RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
        cargo build --release --locked --quiet --target $TARGET --bins) >build/guest.log 2>&1; then
        cat build/guest.log >&2
        fail "the guest's programs did not build"
    fi
}

sources() {
    { find $CRATE -name target -prune -o -type f \( -name '*.rs' -o -name 'Cargo.*' \) -print0 | sort -z | xargs -0 sha256sum
        sha256sum scripts/guest.sh scripts/guest_image.py scripts/debian.sh
        cat $KERNEL_PLACE/kernel.name 2>/dev/null; } | sha256sum | cut -d ' ' -f 1
}

is_made() { [ -e "$PLACE/isopod-shim" ] && [ "$(cat "$PLACE/stamp" 2>/dev/null)" = "$(sources)" ]; }

mkdir -p build
lock_kernel
# apt is asked for a newer kernel only when something is to be made anyway: asking alone takes longer than all the rest.
if command -v qemu-system-x86_64 >/dev/null && is_made; then exit 0; fi
install_packages qemu-system-x86 e2fsprogs zstd lz4 binutils
fetch_kernel
if is_made; then exit 0; fi
build_binaries
.venv/bin/python -m scripts.guest_image --kernel $KERNEL_PLACE/kernel --agent "$BUILT/isopod-guest" --shim "$BUILT/isopod-shim" \
    --stamp "$(sources)" --to "$PLACE"
