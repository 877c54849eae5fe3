# Sourced by set-up and by scripts/cargo.sh: finds a cargo that can build the core.
#
# The cargo on PATH is taken if it is new enough and its rustc answers; else Debian's in /usr/bin, which set-up installs.
CARGO_VERSION_MIN=1.85

# Put the chosen cargo first on PATH; fail if there is none.
find_cargo() {
    local folder
    for folder in "$(dirname "$(command -v cargo || echo /usr/bin/cargo)")" /usr/bin; do
        if cargo_is_new_enough "$folder"; then
            export PATH="$folder:$PATH"
            return 0
        fi
    done
    return 1
}

cargo_is_new_enough() {
    local version
    version=$("$1/cargo" --version 2>/dev/null | awk '{ print $2 }')
    [ -n "$version" ] && "$1/rustc" --version >/dev/null 2>&1 || return 1
    [ "$(printf '%s\n%s\n' "$CARGO_VERSION_MIN" "$version" | sort -V | head -n 1)" = "$CARGO_VERSION_MIN" ]
}
