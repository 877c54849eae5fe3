#!/bin/bash
# What the tests below tests/vm need and no other test does: QEMU, and the kernel that the guest boots.
#
# The kernel is Debian's cloud kernel of the name in scripts/debian.sh, unpacked to build/vm/kernel and never installed: this machine's own
# boot is not touched. Safe to repeat: what is there is not fetched again. `VM_KERNEL=linux-image-cloud-amd64 scripts/vm.sh` takes another.
set -euo pipefail
cd "$(dirname "$0")/.."
say_as=vm
. scripts/debian.sh

lock_kernel
install_packages qemu-system-x86 e2fsprogs busybox-static
fetch_kernel
