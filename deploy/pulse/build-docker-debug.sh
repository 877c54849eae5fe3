#!/bin/bash
# Builds the image that logs everything and has a shell; see build-docker.sh.
set -euo pipefail
TARGET=debug IMAGE="${IMAGE:-isopod/pulse:debug}" exec "$(dirname "$0")/build-docker.sh" "$@"
