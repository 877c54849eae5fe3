#!/bin/bash
# The first run: a node that stays, a starter image that needs no registry, a container with an address, and what to type next.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/node.sh
readonly IMAGE=isopod/busybox
readonly NAME=hello

[ "$(id -u)" = 0 ] || fail "not root: containers need root here; run: sudo make run"

if node_answers; then
    say "a node answers already"
else
    start_node
    say "node started"
fi

if ! "$ISOPOD" image inspect "$IMAGE" >/dev/null 2>&1; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    scripts/starter_image.sh "$folder"
    "$ISOPOD" import "$folder" "$IMAGE"
fi

if "$ISOPOD" inspect "$NAME" >/dev/null 2>&1; then "$ISOPOD" rm -f "$NAME" >/dev/null; fi

# shellcheck disable=SC2016  # expanded inside the container
command='echo "hello from $(hostname)"; ip -4 addr show eth0; ping -c 1 -w 5 $(ip route | sed -n "s/^default via \([^ ]*\).*/\1/p")'
echo "\$ isopod run --name $NAME $IMAGE sh -c '$command'"
"$ISOPOD" run --name "$NAME" "$IMAGE" sh -c "$command"
echo
echo "\$ isopod ps -a"
"$ISOPOD" ps -a
echo
echo "\$ isopod logs $NAME"
"$ISOPOD" logs "$NAME"
cat <<NEXT

It works. Next:
  export PATH="\$PWD/.venv/bin:\$PATH"
  isopod run -it --rm $IMAGE sh                a shell in a new container
  isopod run -d --name web $IMAGE sleep 1h     one that stays
  isopod exec -n web ps                                one more command in it
  isopod rm -f web
  isopod --help
  make stop                                            end the node again
NEXT
