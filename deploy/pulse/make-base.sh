#!/bin/bash
# Makes the Debian 12 image that the Dockerfile builds on, where no registry can be reached: debootstrap fills a folder, an engine imports it.
#   deploy/pulse/make-base.sh [NAME]          then: BASE=NAME deploy/pulse/build-docker.sh
# NAME is localhost/isopod-base:12 unless said. Packages come from where this machine's apt takes them, or from MIRROR, the address of
# Debian's archive, and MIRROR-security. Authorities that were added to this machine (/usr/local/share/ca-certificates) are trusted by what
# is built on it too. Needs root, as debootstrap does.
set -euo pipefail
cd "$(dirname "$0")"
. ./engine.sh
readonly NAME=${1:-localhost/isopod-base:12}
readonly RELEASE=bookworm
readonly AUTHORITIES=/usr/local/share/ca-certificates

# One line for each place: address, release.
places() {
    if [ -n "${MIRROR-}" ]; then
        printf '%s\n' "$MIRROR $RELEASE" "$MIRROR $RELEASE-updates" "$MIRROR-security $RELEASE-security"
    elif command -v apt-get >/dev/null; then
        # shellcheck disable=SC2016  # apt's own placeholders
        apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' "Created-By: Packages" |
            sed -n "s/^\([^ ]* $RELEASE\(-updates\|-security\|\)\) main\$/\1/p" | sort -u
    fi
}

[ "$(id -u)" = 0 ] || fail "not root: debootstrap makes the files of root; run: sudo $0"
PATH=$PATH:/usr/sbin:/sbin
command -v debootstrap >/dev/null || fail "debootstrap is not installed: apt-get install debootstrap"
find_engine
lines=$(places)
mirror=$(sed -n "s/ $RELEASE\$//p" <<<"$lines" | head -n 1)
[ -n "$mirror" ] || fail "this machine's apt knows no Debian 12 (try apt-get update): say MIRROR=ADDRESS of Debian's archive"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say "fetching Debian 12 from $mirror (a minute)"
debootstrap --variant=minbase "$RELEASE" "$folder/root" "$mirror" >"$folder/log" 2>&1 ||
    fail "debootstrap failed: $(tail -n 3 "$folder/log")"
sed 's/.*/deb & main/' <<<"$lines" >"$folder/root/etc/apt/sources.list"
if [ -d "$AUTHORITIES" ]; then
    install -d "$folder/root$AUTHORITIES"
    find "$AUTHORITIES" -name '*.crt' -exec cp -t "$folder/root$AUTHORITIES" {} +
fi
rm -rf "$folder/root"/var/cache/apt/* "$folder/root"/var/lib/apt/lists/* "$folder/root"/dev/*
tar --numeric-owner -C "$folder/root" -c . | "$ENGINE" import - "$NAME" >/dev/null
say "made $NAME; next: BASE=$NAME deploy/pulse/build-docker.sh"
