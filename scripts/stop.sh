#!/bin/bash
# Ends the node that `make run` started, and the container it made. Other containers go on: they do not need a node to live.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/node.sh

if ! node_alive; then
    rm -f "$NODE_FILE"
    exit 0
fi
if "$ISOPOD" inspect hello >/dev/null 2>&1; then "$ISOPOD" rm -f hello >/dev/null; fi
others=$("$ISOPOD" ps --quiet 2>/dev/null | wc -l)
stop_node
say "node stopped"
[ "$others" = 0 ] || say "$others containers run on; make run adopts them again"
