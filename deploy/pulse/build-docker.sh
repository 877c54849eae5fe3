#!/bin/bash
# Builds the image of the metrics agent. DOCKER is the program that builds (docker, podman), IMAGE the name it gets, BASE a Debian 12 image.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${DOCKER:-docker}" build --file deploy/pulse/Dockerfile --target "${TARGET:-agent}" --build-arg "BASE=${BASE:-debian:12-slim}" \
    --tag "${IMAGE:-isopod/pulse:latest}" .
