"""The grammar of the commands about virtual machines, and of the options by which `run` makes one. See `grammar`.

A machine is a container with a kernel of its own: `ps`, `logs`, `exec`, `stop`, `rm` and all other commands take machines as well. The
commands here add what only machines have, and the words of those who come from other tools: `--name NAME` or NAME, `list` or `ls`.
"""

from __future__ import annotations

from isopod.cli.grammar_parts import FORMAT, NETWORK_RATE, PUBLISH, QUIET, Argument, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


_VM: Final = Argument("VM", many=True, optional=True, complete="container")
_ONE: Final = Argument("VM", optional=True, complete="container")
_NAME: Final = Option("-n --name", "the machine, instead of the word", "NAME", complete="container")
_SHAPE: Final = (
    Option("--vcpus", "processors", "N", default="1"),
    Option("--disk", "the disk for what the guest writes, which takes what is written: digits with k, m, g or t", "SIZE", default="10g"),
    Option(
        "--driver",
        "what runs it",
        "NAME",
        default="auto",
        choices=("auto", "qemu", "cloud-hypervisor", "firecracker", "microvm-nix", "systemd"),
    ),
    Option("--machine", "the kind of machine that QEMU makes", "KIND", default="microvm", choices=("microvm", "q35")),
    Option("--cold", "boot it, even where a booted template could be copied"),
)

RUN_OPTIONS: Final = (
    Option(
        "--isolation",
        "namespaces, or a virtual machine with its own kernel",
        "KIND",
        default="container",
        choices=("container", "vm"),
    ),
    *_SHAPE,
)
"""Of `run` and `create`; all but the first count for machines only."""

VM_COMMANDS: Final = (
    Command(
        ("vm create",),
        "create a virtual machine without starting it",
        about="It is made of an image, like a container, or of a configuration: a flake (FOLDER or FOLDER#NAME), a microvm.nix module, the "
        "folder of a built runner, or the NAME of a systemd unit microvm@NAME with --driver systemd. Without COMMAND it runs the image's, "
        "or nothing but its agent, and is up until it is stopped. A COMMAND with options of its own comes after --.",
        arguments=(Argument("NAME", optional=True), Argument("COMMAND", many=True, optional=True)),
        options=(
            Option("-n --name", "its name, instead of the word", "NAME"),
            Option("--image", "what it is made of", "IMAGE", complete="image"),
            Option("-c --config", "what it is made of, instead of an image", "PATH", complete="file"),
            Option("-m --memory", "its memory, its kernel's included; a bare number is MiB", "SIZE", default="256m"),
            *_SHAPE,
            Option("--network", "bridge, none, or the name of a network", "NETWORK", default="bridge", complete="network"),
            PUBLISH,
            NETWORK_RATE,
            Option("-e --env", "set a variable; KEY alone takes this shell's value", "KEY[=VALUE]", repeatable=True),
            Option("-v --volume", "show a file or folder of the host inside", "HOST:CONTAINER[:ro]", repeatable=True, complete="file"),
            Option("-l --label", "a label", "KEY[=VALUE]", repeatable=True),
        ),
        examples=(
            "isopod vm create web --image isopod/busybox --vcpus 2 --memory 512m",
            "isopod vm create job --image isopod/busybox -- sh -c 'date; sleep 5'",
            "isopod vm create --name box --config ./flake#box",
        ),
        method="container.create",
    ),
    Command(
        ("vm start",),
        "start machines",
        arguments=(_VM,),
        options=(_NAME,),
        examples=("isopod vm start web", "isopod vm start --name web"),
        method="container.start",
    ),
    Command(
        ("vm stop",),
        "end machines: the command is asked, then the guest, then the monitor is killed",
        arguments=(_VM,),
        options=(_NAME, Option("-t --time", "how long to wait before that: 30, 1m", "SECONDS", default="10")),
        examples=("isopod vm stop web",),
        method="container.stop",
    ),
    Command(
        ("vm restart",),
        "stop machines and start them again",
        arguments=(_VM,),
        options=(_NAME, Option("-t --time", "how long to wait for their end: 30, 1m", "SECONDS", default="10")),
        method="container.restart",
    ),
    Command(("vm pause",), "stop the processors of machines", arguments=(_VM,), options=(_NAME,), method="container.pause"),
    Command(("vm resume", "vm unpause"), "let paused machines go on", arguments=(_VM,), options=(_NAME,), method="container.unpause"),
    Command(
        ("vm delete", "vm rm", "vm remove"),
        "remove machines that do not run, with their disks and snapshots",
        arguments=(_VM,),
        options=(_NAME, Option("-f --force", "kill them first if they run")),
        examples=("isopod vm delete web", "isopod vm rm -f web"),
        method="container.remove",
    ),
    Command(
        ("vm list", "vm ls", "vm ps"),
        "list machines, those that do not run too",
        options=(FORMAT, QUIET),
        method="container.list",
    ),
    Command(
        ("vm status",),
        "print what a machine is and does, asked of itself",
        arguments=(_ONE,),
        options=(_NAME, FORMAT),
        examples=("isopod vm status web", "isopod vm status --name web --format json"),
        method="vm.status",
    ),
    Command(
        ("vm logs",),
        "print what a machine's command wrote",
        about="What its kernel wrote is on its console: isopod vm console --no-follow NAME.",
        arguments=(_ONE,),
        options=(
            _NAME,
            Option("-f --follow", "go on until it ends"),
            Option("--no-follow", "print what there is (what happens without -f anyway)"),
            Option("--tail --lines", "only the last N lines", "N", default="all"),
            Option("--since", "only what is newer: 10m, 2026-11-20T08:00:00Z, or seconds since 1970", "TIME"),
            Option("--timestamps", "begin each line with its time"),
        ),
        method="container.logs",
    ),
    Command(
        ("vm exec",),
        "run one more command in a machine",
        arguments=(Argument("VM", complete="container"), Argument("COMMAND", many=True)),
        options=(
            _NAME,
            Option("-i --interactive", "hand this terminal's input on to the command"),
            Option("-t --tty", "give the command a terminal (ctrl-p ctrl-q detaches)"),
            Option("-e --env", "set a variable; KEY alone takes this shell's value", "KEY[=VALUE]", repeatable=True),
            Option("-w --workdir", "the working folder inside", "FOLDER"),
            Option("-u --user", "run as this user: a name or a number, also with a group", "USER[:GROUP]"),
        ),
        examples=("isopod vm exec web uname -r", "isopod vm exec -it web sh"),
        method="container.exec",
        rest=True,
        usage_exit_code=125,
        failure_exit_code=125,
    ),
    Command(
        ("vm console",),
        "look at a machine's console, and type on it",
        about="What it showed last comes first. ctrl-p ctrl-q leaves it.",
        arguments=(_ONE,),
        options=(
            _NAME,
            Option("--no-follow", "print what it showed, and leave"),
            Option("--tail", "so many bytes of what it showed come first, 65536 at most", "BYTES", default="16384"),
        ),
        examples=("isopod vm console web", "isopod vm console --no-follow web"),
        method="vm.console",
    ),
    Command(
        ("vm snapshot",),
        "write a machine down as it is at this moment, its memory and its disk",
        about="It stands still for that long. A SNAPSHOT without a name is called latest; one of that name must not exist.",
        arguments=(Argument("VM", optional=True, complete="container"), Argument("SNAPSHOT", optional=True)),
        options=(_NAME, Option("--remove", "remove the snapshot instead")),
        examples=("isopod vm snapshot web before-upgrade", "isopod vm snapshot --remove web before-upgrade"),
        method="vm.snapshot",
    ),
    Command(
        ("vm restore",),
        "let a machine go on from a snapshot",
        about="What it does now is ended, what its disk holds now is lost. Clock, randomness and addresses are renewed.",
        arguments=(Argument("VM", optional=True, complete="container"), Argument("SNAPSHOT", optional=True)),
        options=(_NAME,),
        examples=("isopod vm restore web before-upgrade",),
        method="vm.restore",
    ),
    Command(
        ("vm resize",),
        "give a machine other memory or processors",
        about="Memory changes at once, up to what the machine was started with; more, and processors, take effect at its next start.",
        arguments=(_ONE,),
        options=(_NAME, Option("--vcpus", "processors", "N"), Option("-m --memory", "its memory", "SIZE")),
        examples=("isopod vm resize web --memory 384m",),
        method="vm.resize",
    ),
    Command(
        ("vm update",),
        "build a machine's configuration anew",
        about="For machines that a flake or a microvm.nix module describes (--config). What runs goes on as it is; the next start takes "
        "what was built. A start alone builds nothing: it takes what there is.",
        arguments=(_ONE,),
        options=(_NAME,),
        examples=("isopod vm update web",),
        method="vm.update",
    ),
)
