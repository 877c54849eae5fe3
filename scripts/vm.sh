#!/bin/bash
# What the tests below tests/vm need and no other test does: QEMU, and the kernel that the guest boots.
#
# The kernel is Debian's cloud kernel of the name below, unpacked to build/vm/kernel and never installed: this machine's own boot is not
# touched. Safe to repeat: what is there is not fetched again. `VM_KERNEL=linux-image-cloud-amd64 scripts/vm.sh` takes another one.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly KERNEL=${VM_KERNEL:-linux-image-6.12-cloud-amd64}
readonly PLACE=build/vm
readonly DEADLINE_S=300

fail() { printf 'vm: %s\n' "$*" >&2; exit 1; }

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "not root: cannot install ${missing[*]}"
    printf 'vm: installing Debian packages: %s\n' "${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    timeout $DEADLINE_S apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        { apt-get update -qq && timeout $DEADLINE_S apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; } ||
        fail "apt-get could not install: ${missing[*]}"
}

# The name above is a package without files that depends on the newest kernel of its line.
newest() { apt-cache depends "$KERNEL" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1; }

fetch_kernel() {
    local package new
    package=$(newest)
    [ -n "$package" ] || { apt-get update -qq && package=$(newest); }
    [ -n "$package" ] || fail "apt knows no $KERNEL"
    if [ -e $PLACE/kernel.name ] && [ "$(cat $PLACE/kernel.name)" = "$package" ]; then return; fi
    printf 'vm: fetching %s\n' "$package" >&2
    new=$(mktemp -d $PLACE/new.XXXXXX)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$new'" EXIT
    # As root apt warns that its own user cannot write here; that is about rights, not about the package.
    (cd "$new" && timeout $DEADLINE_S apt-get download -qq "$package" 2>apt.log) || fail "could not fetch $package: $(cat "$new/apt.log")"
    dpkg-deb -x "$new"/*.deb "$new/kernel"
    rm -rf $PLACE/kernel $PLACE/kernel.name
    mv "$new/kernel" $PLACE/kernel
    printf '%s\n' "$package" >$PLACE/kernel.name
}

mkdir -p $PLACE
exec 9>$PLACE/lock
flock 9
install_packages qemu-system-x86 e2fsprogs busybox-static
fetch_kernel
