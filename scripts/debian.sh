# Sourced by scripts/vm.sh and scripts/guest.sh: Debian packages that are missing, and Debian's kernel, fetched but not installed.
#
# Whoever sources it has set `say_as` (the word before its messages) and is in the project's folder.
readonly KERNEL=${VM_KERNEL:-linux-image-6.12-cloud-amd64}
readonly KERNEL_PLACE=build/vm
readonly DEBIAN_DEADLINE_S=300

say() { printf '%s: %s\n' "$say_as" "$*" >&2; }
fail() { say "$*"; exit 1; }

# Install those of the packages that are not; the lists are fetched only if the packages cannot be installed without.
install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "apt-get not found: install by hand: ${missing[*]}"
    [ "$(id -u)" = 0 ] || fail "not root: cannot install ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    timeout $DEBIAN_DEADLINE_S apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        { apt-get update -qq && timeout $DEBIAN_DEADLINE_S apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; } ||
        fail "apt-get could not install: ${missing[*]}"
}

# The name above is a package without files that depends on the newest kernel of its line.
newest_kernel() { apt-cache depends "$KERNEL" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1; }

# Unpack the kernel's package to build/vm/kernel, unless the newest is there already. A kernel that is there does where apt knows none.
fetch_kernel() {
    local package new have
    have=$(cat $KERNEL_PLACE/kernel.name 2>/dev/null || true)
    package=$(newest_kernel)
    [ -n "$package" ] || { apt-get update -qq && package=$(newest_kernel); } || true
    [ -n "$package" ] || package=$have
    [ -n "$package" ] || fail "apt knows no $KERNEL"
    [ "$have" != "$package" ] || return 0
    say "fetching $package"
    new=$(mktemp -d $KERNEL_PLACE/new.XXXXXX)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$new'" EXIT
    # As root apt warns that its own user cannot write here; that is about rights, not about the package.
    (cd "$new" && timeout $DEBIAN_DEADLINE_S apt-get download -qq "$package" 2>apt.log) ||
        fail "could not fetch $package: $(cat "$new/apt.log")"
    dpkg-deb -x "$new"/*.deb "$new/kernel"
    rm -rf $KERNEL_PLACE/kernel $KERNEL_PLACE/kernel.name
    mv "$new/kernel" $KERNEL_PLACE/kernel
    printf '%s\n' "$package" >$KERNEL_PLACE/kernel.name
}

# Fetching and unpacking are for one at a time.
lock_kernel() {
    mkdir -p $KERNEL_PLACE
    exec 9>$KERNEL_PLACE/lock
    flock 9
}
