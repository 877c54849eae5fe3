#!/bin/bash
# Builds the image of the metrics agent.
#   deploy/pulse/build-docker.sh [OPTION...]      OPTIONs go to the engine: --no-cache, --network host, --volume ...
# ENGINE is docker or podman (the first that answers), IMAGE the name that it gets (isopod/pulse:latest), BASE a Debian 12 to build on
# (debian:12-slim; make-base.sh makes one without a registry).
set -euo pipefail
cd "$(dirname "$0")"
. ./engine.sh
find_engine
cd ../..
exec "$ENGINE" build --file deploy/pulse/Dockerfile --target "${TARGET:-agent}" --build-arg "BASE=${BASE:-debian:12-slim}" \
    --tag "${IMAGE:-isopod/pulse:latest}" "$@" .
