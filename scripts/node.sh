# Sourced by scripts/run.sh and scripts/stop.sh: the node that `make run` looks after.
#
# Where systemd runs the node is the unit isopod.service, made from deploy/systemd and gone after a reboot; elsewhere it is a process
# in a session of its own, remembered by its pid and start time, so that a reused pid is never mistaken for it.
# ISOPOD_ROOT, ISOPOD_RUN_ROOT, ISOPOD_SOCKET and the other variables of isopod's path table reach the node too.

ISOPOD=$PWD/.venv/bin/isopod
NODE_FILE=build/run/node
UNIT=isopod.service
UNIT_FILE=/run/systemd/system/$UNIT
READY_DEADLINE_S=30
STOP_DEADLINE_S=30

say() { printf 'isopod: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

has_systemd() { [ -d /run/systemd/system ]; }

node_answers() { "$ISOPOD" info --format json >/dev/null 2>&1; }

log_file() { echo "${ISOPOD_ROOT:+$ISOPOD_ROOT/node.log}" | sed 's#^$#/var/log/isopod/node.log#'; }

# Field 22 of /proc/PID/stat, counted behind the command's name, which may hold spaces.
started_ticks() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

# Print the pid of the node that was started here, if that very process is alive.
own_node() {
    local pid ticks
    [ -e "$NODE_FILE" ] || return 1
    read -r pid ticks <"$NODE_FILE"
    [ "$(started_ticks "$pid")" = "$ticks" ] && echo "$pid"
}

# Wait until `$2...` succeeds, for at most $1 seconds, looking twenty times a second.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.05
    done
}

start_node() {
    if has_systemd; then start_unit; else start_process; fi
    wait_until "$READY_DEADLINE_S" node_answers_or_died && node_answers || fail "the node did not come up: $(why_not)"
}

node_answers_or_died() { node_answers || ! node_alive; }

node_alive() { if has_systemd; then [ -e "$UNIT_FILE" ] && systemctl --quiet is-active "$UNIT"; else own_node >/dev/null; fi; }

why_not() {
    if has_systemd; then journalctl --unit "$UNIT" --lines 5 --no-pager --output cat; else tail -n 5 "$(log_file)"; fi
}

start_unit() {
    sed "s#@ISOPOD@#$ISOPOD#" deploy/systemd/$UNIT >"$UNIT_FILE.new"
    env | sed -n 's/^\(ISOPOD_[A-Z_]*\)=\(.*\)$/Environment="\1=\2"/p' >"$UNIT_FILE.env"
    sed "/^ExecStart=/r $UNIT_FILE.env" "$UNIT_FILE.new" >"$UNIT_FILE"
    rm "$UNIT_FILE.new" "$UNIT_FILE.env"
    systemctl daemon-reload
    systemctl start "$UNIT"
}

start_process() {
    local log
    log=$(log_file)
    mkdir -p "$(dirname "$log")" "$(dirname "$NODE_FILE")"
    setsid "$ISOPOD" node </dev/null >>"$log" 2>&1 &
    echo "$! $(started_ticks $!)" >"$NODE_FILE"
}

stop_node() {
    local pid
    if has_systemd && [ -e "$UNIT_FILE" ]; then
        systemctl stop "$UNIT"
        rm -f "$UNIT_FILE"
        systemctl daemon-reload
    elif pid=$(own_node); then
        kill -TERM "$pid"
        wait_until "$STOP_DEADLINE_S" node_gone || fail "the node (pid $pid) still runs after $STOP_DEADLINE_S s: see $(log_file)"
    fi
    rm -f "$NODE_FILE"
}

node_gone() { ! own_node >/dev/null; }
