# Sourced by the scripts beside it: which program makes images, and how to say things.
#
# ENGINE names it (docker, podman, or a path); unset, it is the first of docker and podman that is installed and answers.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() { say "$*"; exit 1; }

find_engine() {
    local program
    if [ -n "${ENGINE-}" ]; then
        command -v "$ENGINE" >/dev/null || fail "ENGINE=$ENGINE: no such program"
        return
    fi
    for program in docker podman; do
        if command -v "$program" >/dev/null && "$program" info >/dev/null 2>&1; then
            ENGINE=$program
            return
        fi
    done
    fail "neither docker nor podman answers here: install one (apt-get install podman), start docker's daemon, or say ENGINE=PROGRAM"
}
