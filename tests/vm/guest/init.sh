#!/bin/sh
# The first process of the guest's memory file system: load the modules in the order of their numbers, mount the disk, go there.
set -e
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do
    /bin/busybox insmod "$module"
done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root
exec /bin/busybox switch_root /root /isopod/tests/vm/guest/main.sh
