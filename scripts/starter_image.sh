#!/bin/bash
# Builds the root file system of the image isopod/busybox in an empty folder, from Debian's busybox-static: starter_image.sh FOLDER
# The same busybox always gives the same files and times, so the same image.
set -euo pipefail
folder=$1
busybox=/bin/busybox
[ -x "$busybox" ] || { echo "busybox is not installed: apt-get install busybox-static" >&2; exit 1; }

umask 022
mkdir -p "$folder"/{bin,dev,etc,home,proc,root,run,sys,usr/bin,var/log}
install -d -m 1777 "$folder/tmp" "$folder/var/tmp"
chmod 700 "$folder/root"
install -m 755 "$busybox" "$folder/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$folder/bin/$applet"
done
ln -s /bin/env "$folder/usr/bin/env"
cat >"$folder/etc/passwd" <<'END'
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
user:x:1000:1000:user:/home:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
END
cat >"$folder/etc/group" <<'END'
root:x:0:
daemon:x:1:
user:x:1000:
nogroup:x:65534:
END
cat >"$folder/etc/os-release" <<'END'
ID=isopod-busybox
NAME="isopod starter image"
PRETTY_NAME="isopod starter image (busybox)"
END
chmod 755 "$folder"
find "$folder" -exec touch --no-dereference --date=@0 {} +
