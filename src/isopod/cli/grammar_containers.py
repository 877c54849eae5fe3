"""The grammar of the commands about containers. See `grammar`."""

from __future__ import annotations

from isopod.cli.grammar_parts import COMMAND, CONTAINER, CONTAINERS, FORMAT, NETWORK_RATE, PUBLISH, QUIET, Argument, Command, Option
from isopod.cli.grammar_vm import RUN_OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


_ENV: Final = Option("-e --env", "set a variable; KEY alone takes this shell's value", "KEY[=VALUE]", repeatable=True)
_WORKDIR: Final = Option("-w --workdir", "the working folder inside", "FOLDER")
_USER: Final = Option("-u --user", "run as this user: a name or a number, also with a group", "USER[:GROUP]")
_INTERACTIVE: Final = Option("-i --interactive", "hand this terminal's input on to the command")
_TTY: Final = Option("-t --tty", "give the command a terminal (ctrl-p ctrl-q detaches)")

_CREATE_OPTIONS: Final = (
    Option("--rm", "remove the container once it has ended"),
    Option("-n --name", "the container's name", "NAME", default="one that is free"),
    _ENV,
    Option(
        "-v --volume",
        "show a file or folder of the host inside; HOST is absolute or begins with ./ or ../",
        "HOST:CONTAINER[:ro]",
        repeatable=True,
        complete="file",
    ),
    _WORKDIR,
    _USER,
    Option("-m --memory", "memory at most: digits with k, m, g or t", "SIZE", default="no limit"),
    Option("--cpus", "CPU time at most, in cores: 0.5", "N", default="no limit"),
    Option("--pids-limit", "processes at most; -1 for no limit", "N", default="no limit"),
    Option("--network", "bridge, none, host, or the name of a network", "NETWORK", default="bridge", complete="network"),
    PUBLISH,
    NETWORK_RATE,
    Option("--hostname", "the host name inside", "NAME", default="the container's short id"),
    Option("-l --label", "a label for the container", "KEY[=VALUE]", repeatable=True),
    Option("--health-cmd", "a command for sh -c that is run inside from time to time; well is what ends with 0", "COMMAND"),
    Option("--health-interval", "how long to wait before each: 10s, 1m", "TIME", default="30s"),
    Option("--health-timeout", "how long each may take", "TIME", default="30s"),
    Option("--health-retries", "how many failures in a row make it unhealthy", "N", default="3"),
    Option("--health-start-period", "so long after the start a failure does not count, until the first success", "TIME", default="0s"),
    _INTERACTIVE,
    _TTY,
    *RUN_OPTIONS,
)
_IMAGE_AND_COMMAND: Final = (Argument("IMAGE", complete="image"), COMMAND)

CONTAINER_COMMANDS: Final = (
    Command(
        ("run", "container run"),
        "create a container from an image and start it",
        about="Without -d its output is shown here until it ends, signals are passed on to it, and its exit code is returned. "
        "Everything after IMAGE belongs to the command.",
        arguments=_IMAGE_AND_COMMAND,
        options=(Option("-d --detach", "print the container's id and return as soon as it runs"), *_CREATE_OPTIONS),
        examples=(
            "isopod run --rm isopod/busybox echo hello",
            "isopod run -it --rm isopod/busybox sh",
            "isopod run -d --name web -p 8080:80 -m 64m --cpus 0.5 -v ./site:/www:ro isopod/busybox httpd -f -h /www",
        ),
        method="container.run",
        rest=True,
        usage_exit_code=125,
        failure_exit_code=125,
    ),
    Command(
        ("exec", "container exec"),
        "run one more command inside a running container",
        about="The container is the first word, or -n NAME; everything after it belongs to the command. "
        "The command's exit code is returned.",
        arguments=(Argument("CONTAINER", complete="container"), Argument("COMMAND", many=True)),
        options=(
            Option("-n --name", "the container, instead of the first word", "NAME", complete="container"),
            _INTERACTIVE,
            _TTY,
            _ENV,
            _WORKDIR,
            _USER,
        ),
        examples=("isopod exec web ps", "isopod exec -n web cat /etc/hosts", "isopod exec -it web sh"),
        method="container.exec",
        rest=True,
        usage_exit_code=125,
        failure_exit_code=125,
    ),
    Command(
        ("ps", "container ls", "container list", "container ps"),
        "list running containers",
        about="Filters: status=STATE (implies -a; several: any of them), label=KEY[=VALUE] (several: all of them), name=PART or a pattern "
        "with * and ?, since=TIME and until=TIME for the creation, and for what is used now memory=SIZE, cpu=TIME, pids=N at least.",
        options=(
            Option("-a --all", "also those that do not run"),
            Option("-f --filter", "only those of which this is true", "KEY=VALUE", repeatable=True),
            Option("-n --last", "only the first N of the list, those that do not run too", "N"),
            Option("--sort", "in which order", "BY", default="created", choices=("created", "name", "memory", "cpu")),
            FORMAT,
            QUIET,
        ),
        examples=(
            "isopod ps -a",
            "isopod ps --filter status=exited --filter label=tier=web --last 5",
            "isopod ps --filter memory=100m --sort memory",
            "isopod ps --format json",
        ),
        method="container.list",
    ),
    Command(
        ("logs", "container logs"),
        "print what a container wrote",
        about="With -f a restart of the node is waited for (a minute at most) and bridged: nothing is lost, nothing comes twice.",
        arguments=(CONTAINER,),
        options=(
            Option("-f --follow", "go on until the container ends"),
            Option("--tail", "only the last N lines", "N", default="all"),
            Option("--since", "only what is newer: 10m, 2026-11-20T08:00:00Z, or seconds since 1970", "TIME"),
            Option("-t --timestamps", "begin each line with its time"),
        ),
        examples=("isopod logs -f web", "isopod logs --tail 20 --since 10m web"),
        method="container.logs",
    ),
    Command(
        ("start", "container start"),
        "start containers that are created or have ended",
        arguments=(CONTAINERS,),
        options=(
            Option("-a --attach", "show the output here until it ends, pass signals on, return its exit code"),
            Option("-i --interactive", "also hand this terminal's input on; implies -a"),
            Option("-d --detach", "return as soon as it runs (what happens without -a anyway)"),
        ),
        examples=("isopod start web", "isopod start -ai box"),
        method="container.start",
        failure_exit_code=125,
    ),
    Command(
        ("stop", "container stop"),
        "end containers: SIGTERM, and SIGKILL if that is not enough",
        arguments=(CONTAINERS,),
        options=(Option("-t --time", "how long to wait before SIGKILL: 30, 1m", "SECONDS", default="10"),),
        examples=("isopod stop web", "isopod stop -t 1m db web"),
        method="container.stop",
    ),
    Command(
        ("kill", "container kill"),
        "send a signal to a container's first process",
        arguments=(CONTAINERS,),
        options=(Option("-s --signal", "which one: a name or a number", "SIGNAL", default="KILL", complete="signal"),),
        examples=("isopod kill web", "isopod kill -s HUP web"),
        method="container.kill",
    ),
    Command(
        ("rm", "container rm", "container remove"),
        "remove containers that do not run",
        arguments=(CONTAINERS,),
        options=(Option("-f --force", "kill them first if they run"),),
        examples=("isopod rm web", "isopod rm -f web db"),
        method="container.remove",
    ),
    Command(
        ("restart", "container restart"),
        "stop containers and start them again",
        arguments=(CONTAINERS,),
        options=(Option("-t --time", "how long to wait before SIGKILL: 30, 1m", "SECONDS", default="10"),),
        examples=("isopod restart web",),
        method="container.restart",
    ),
    Command(
        ("pause", "container pause"),
        "freeze every process of containers",
        arguments=(CONTAINERS,),
        examples=("isopod pause web",),
        method="container.pause",
    ),
    Command(
        ("unpause", "container unpause"),
        "let paused containers go on",
        arguments=(CONTAINERS,),
        examples=("isopod unpause web",),
        method="container.unpause",
    ),
    Command(
        ("update", "container update"),
        "change limits, labels, variables and mounts of containers",
        about="Of each container all of it is changed or nothing. Limits and labels change at once, also of one that runs; variables are "
        "used by `exec` at once and by the container from its next start on; mounts are changed of one that does not run.",
        arguments=(CONTAINERS,),
        options=(
            Option("-m --memory", "memory at most: digits with k, m, g or t; -1 for no limit", "SIZE"),
            Option("--cpus", "CPU time at most, in cores; -1 for no limit", "N"),
            Option("--pids --pids-limit", "processes at most; -1 for no limit", "N"),
            Option("-l --label", "set a label", "KEY[=VALUE]", repeatable=True),
            Option("--label-rm", "remove a label", "KEY", repeatable=True),
            _ENV,
            Option("--env-rm", "remove a variable", "KEY", repeatable=True),
            Option("-v --volume", "add a mount", "HOST:CONTAINER[:ro]", repeatable=True, complete="file"),
            Option("--volume-rm", "remove a mount, by its place inside", "CONTAINER", repeatable=True),
        ),
        examples=(
            "isopod update --memory 128m --cpus 0.5 web",
            "isopod update --label tier=web --label-rm draft web db",
            "isopod update -v ./site:/www:ro web",
        ),
        method="container.update",
    ),
    Command(
        ("stats", "container stats"),
        "show what containers use now, beside their limits",
        about="One look, no repetition: --no-stream says what happens anyway.",
        arguments=(Argument("CONTAINER", many=True, optional=True, complete="container"),),
        options=(Option("--no-stream", "look once"), FORMAT),
        examples=("isopod stats", "isopod stats web db"),
        method="container.stats",
    ),
    Command(
        ("events", "system events"),
        "print what happens to containers, as it happens",
        about="A change is printed once it is durable, in the order of the journal. A restart of the node is waited for and bridged: "
        "nothing is lost, nothing comes twice. With --since or --cursor old events come first, as far back as the journal's archive goes.",
        options=(
            Option("--since", "begin with what happened then: 10m, 2026-11-20T08:00:00Z, or seconds since 1970", "TIME"),
            Option("--until", "end there", "TIME"),
            Option("--cursor", "begin after the event of that number", "N"),
            Option("-f --filter", "container=NAME or event=KIND; several of one kind: any of them", "KEY=VALUE", repeatable=True),
            FORMAT,
        ),
        examples=("isopod events", "isopod events --since 1h --until 0s --filter container=web", "isopod events --format json"),
        method="container.events",
    ),
    Command(
        ("create", "container create"),
        "create a container without starting it",
        arguments=_IMAGE_AND_COMMAND,
        options=_CREATE_OPTIONS,
        examples=("isopod create --name job isopod/busybox sh -c 'date; sleep 5'",),
        method="container.create",
        rest=True,
    ),
    Command(
        ("wait", "container wait"),
        "wait until containers end, and print their exit codes",
        arguments=(CONTAINERS,),
        examples=("isopod wait job",),
        method="container.wait",
    ),
    Command(
        ("inspect",),
        "print all about containers, images or networks, as JSON",
        about="Each name is looked up as a container, then as an image, then as a network. One JSON object is printed for each.",
        arguments=(Argument("NAME", many=True, complete="container"),),
        examples=("isopod inspect web", "isopod inspect isopod/busybox"),
        method="container.inspect",
    ),
    Command(
        ("container inspect",),
        "print all about containers, as JSON",
        arguments=(CONTAINERS,),
        method="container.inspect",
    ),
    Command(
        ("port", "container port"),
        "print which ports of the host lead to a container that runs",
        about="One line for each, or, with PORT (80, 53/udp), where that one is found.",
        arguments=(CONTAINER, Argument("PORT", optional=True)),
        examples=("isopod port web", "isopod port web 80"),
        method="container.inspect",
    ),
    Command(
        ("cp", "container cp", "vm cp"),
        "copy files into a container, or out of it",
        about="One of the two is CONTAINER:PATH, the other a path here, or - for a tar archive on standard input or output. "
        "A container need not run, a virtual machine must. A folder is copied with what is in it; FOLDER/. means only what is in it. "
        "A destination that is a folder takes the copy, one that is not there becomes it. Modes are kept, and owners on the way in.",
        arguments=(Argument("SOURCE", complete="file"), Argument("DESTINATION", complete="file")),
        options=(
            Option("-a --archive", "on the way out keep owners, set-user-id and devices too"),
            Option("-L --follow-link", "copy what a link at the end of SOURCE leads to"),
            Option("-q --quiet", "show no progress"),
        ),
        examples=(
            "isopod cp ./site web:/www",
            "isopod cp web:/etc/hosts .",
            "isopod cp web:/var/log/. ./logs",
            "isopod cp web:/www - > www.tar",
        ),
        method="container.copy_to",
    ),
    Command(
        ("commit", "container commit"),
        "make an image of a container's files",
        arguments=(CONTAINER, Argument("IMAGE")),
        examples=("isopod commit box my/box:1",),
        method="container.commit",
    ),
)
