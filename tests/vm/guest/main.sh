#!/bin/sh
# The guest's first process on its disk: a machine with one cgroup2 hierarchy, on which pytest runs once; then it is over.
#
# The mount's options are systemd's, and the node lives in a group of its own, as a service does. But no controller is enabled below the
# root: where systemd runs some are, so this is the harder case.
# What the tests said goes as a tar to the second disk; the console only shows what a person would want to see after a failure.
export PATH=/usr/sbin:/usr/bin:/opt/busybox HOME=/root LANG=C.UTF-8 PYTHONHASHSEED=0
mount -t proc proc /proc
mount -t sysfs sys /sys
/bin/busybox --install -s /opt/busybox
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/system.slice/isopod.service
echo $$ >/sys/fs/cgroup/system.slice/isopod.service/cgroup.procs
ip link set lo up
hostname isopod-v2
echo 1 >/proc/sys/net/ipv4/ip_forward

mkdir /result
uname -r >/result/kernel
cat /proc/mounts >/result/mounts
cat /sys/fs/cgroup/cgroup.subtree_control >/result/enabled
cat /proc/self/cgroup >/result/group
cd /isopod || reboot -f
IFS='
'
set -f
# shellcheck disable=SC2046  # one argument on each line
/isopod/.venv/bin/python -m pytest $(cat /arguments) --junitxml=/result/junit.xml 2>&1 | tee /result/output
dmesg >/result/dmesg
tar -c -f /dev/vdb -C /result .
sync
reboot -f
