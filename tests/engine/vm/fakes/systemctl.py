"""A fake of systemctl: units are files of properties in the folder that its first argument names.

`start --wait` lasts until the unit is no longer active, as the real one does; `stop`, `kill` and `show` act on the file.
"""

import os
import sys
import time

POLL_S = 0.02


def main(folder: str, verb: str, *rest: str) -> int:
    """Do what the command line says and return the exit status."""
    if verb == "--version":
        sys.stdout.write("systemd 252 (fake)\n")
        return 0
    if verb == "is-system-running":
        offline = os.path.exists(f"{folder}/.offline")
        sys.stdout.write("offline\n" if offline else "running\n")
        return 1 if offline else 0
    options, mark, names = rest[: rest.index("--")], "--", rest[rest.index("--") + 1 :]
    if len(names) != 1 or not mark:
        return 1
    path = f"{folder}/{names[0]}"
    if verb == "show":
        return show(path, options[0].removeprefix("--property=").split(","))
    if not os.path.exists(path):
        sys.stderr.write(f"Failed to {verb} {names[0]}: Unit {names[0]} not found.\n")
        return 5
    if verb == "start" and options == ("--wait",):
        return start(path)
    if verb == "stop":
        write(path, ActiveState="inactive", Result="success", MainPID="0", ExecMainStatus="0")
        return 0
    if verb == "kill" and options == ("--signal=SIGKILL",):
        write(path, ActiveState="failed", Result="signal", MainPID="0", ExecMainStatus="9")
        return 0
    sys.stderr.write(f"Unknown command verb {verb}.\n")
    return 1


def show(path: str, properties: list[str]) -> int:
    """Print properties; of a unit that is not there its load state only."""
    found = read(path) if os.path.exists(path) else {"LoadState": "not-found", "ActiveState": "inactive"}
    for name in properties:
        sys.stdout.write(f"{name}={found.get(name, '')}\n")
    return 0


def start(path: str) -> int:
    """Make a unit active and wait for its end."""
    write(path, ActiveState="active", MainPID=str(os.getpid()))
    while (found := read(path))["ActiveState"] == "active":
        time.sleep(POLL_S)
    return 0 if found["Result"] == "success" else 1


def read(path: str) -> dict[str, str]:
    """Return a unit's properties."""
    with open(path, encoding="utf-8") as file:
        pairs = (line.rstrip("\n").partition("=") for line in file)
        return {key: value for key, _, value in pairs}


def write(path: str, **changes: str) -> None:
    """Change a unit's properties, all at once for who reads."""
    found = {**read(path), **changes}
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in found.items())
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
