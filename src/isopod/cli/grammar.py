"""The grammar of the command line, as data: every command with its arguments, options, examples and the RPC method behind it.

From these tables come parsing (`parse`), help (`manual`), completion (`completion`) and docs/cli.md (`reference`): what is not
said here does not exist. Nothing is imported at run time and nothing is computed but the tables: every call pays for this file.

The docker words are kept: a command that docker has twice (`ps`, `container ls`) is one command with several names here.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Option:
    """One option.

    Args:
        names: All spellings, the long one last: "-d --detach".
        help: One line.
        value: The name of its value in help; "" for a flag.
        repeatable: May be given several times, all of which count.
        default: What holds if it is not given, in words; shown in help.
        choices: The only values allowed.
        complete: What completion offers for its value: "network", "signal", "file" or "".
    """

    __slots__ = ("choices", "complete", "default", "help", "key", "names", "repeatable", "value")

    def __init__(
        self,
        names: str,
        help: str,  # noqa: A002  the word users know
        value: str = "",
        *,
        repeatable: bool = False,
        default: str = "",
        choices: tuple[str, ...] = (),
        complete: str = "",
    ) -> None:
        self.names: Final = tuple(names.split())
        self.key: Final = self.names[-1].lstrip("-")
        self.help: Final = help
        self.value: Final = value
        self.repeatable: Final = repeatable
        self.default: Final = default
        self.choices: Final = choices
        self.complete: Final = complete


class Argument:
    """One positional argument.

    Args:
        name: As help shows it.
        many: One or more (with `optional`: none or more).
        optional: May be left out.
        complete: What completion offers: "container", "image", "network", "file", "folder" or "".
    """

    __slots__ = ("complete", "many", "name", "optional")

    def __init__(self, name: str, *, many: bool = False, optional: bool = False, complete: str = "") -> None:
        self.name: Final = name
        self.many: Final = many
        self.optional: Final = optional
        self.complete: Final = complete


class Command:
    """One command.

    Args:
        names: All its names, the one of the help first; a name is one or two words.
        help: One line.
        about: What else to know, a paragraph; "".
        arguments: Positional arguments in order; only the last may be `many` or `optional`.
        options: Its options, without the global ones.
        examples: Whole command lines.
        method: The RPC method behind it; "" for none.
        rest: Options end at the first positional argument: what follows belongs to the command inside.
        usage_exit_code: What a malformed command line returns.
        failure_exit_code: What an engine error returns while a container is attached; 0 for the error's own.
    """

    __slots__ = (
        "about",
        "arguments",
        "examples",
        "failure_exit_code",
        "help",
        "method",
        "name",
        "names",
        "options",
        "rest",
        "usage_exit_code",
    )

    def __init__(
        self,
        names: tuple[str, ...],
        help: str,  # noqa: A002  the word users know
        *,
        about: str = "",
        arguments: tuple[Argument, ...] = (),
        options: tuple[Option, ...] = (),
        examples: tuple[str, ...] = (),
        method: str = "",
        rest: bool = False,
        usage_exit_code: int = 2,
        failure_exit_code: int = 0,
    ) -> None:
        self.names: Final = names
        self.name: Final = names[0]
        self.help: Final = help
        self.about: Final = about
        self.arguments: Final = arguments
        self.options: Final = options
        self.examples: Final = examples
        self.method: Final = method
        self.rest: Final = rest
        self.usage_exit_code: Final = usage_exit_code
        self.failure_exit_code: Final = failure_exit_code


PROGRAM: Final = "isopod"
ABOUT: Final = "Run containers on this machine."

HELP: Final = Option("-h --help", "show help and do nothing else")
SOCKET: Final = Option("-H --socket", "the node's socket", "PATH", default="ISOPOD_SOCKET, else the config file's", complete="file")
GLOBAL_OPTIONS: Final = (SOCKET, HELP)
"""Allowed before and after the command's name."""
VERSION: Final = Option("--version", "print the version of this program and do nothing else")

_FORMAT: Final = Option("--format", "how to print", "FORMAT", default="table", choices=("table", "json"))
_QUIET: Final = Option("-q --quiet", "print only names or ids, one a line")
_CONTAINER: Final = Argument("CONTAINER", complete="container")
_CONTAINERS: Final = Argument("CONTAINER", many=True, complete="container")
_IMAGES: Final = Argument("IMAGE", many=True, complete="image")
_NETWORKS: Final = Argument("NETWORK", many=True, complete="network")
_COMMAND: Final = Argument("COMMAND", many=True, optional=True)

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
    Option("--hostname", "the host name inside", "NAME", default="the container's short id"),
    Option("-l --label", "a label for the container", "KEY[=VALUE]", repeatable=True),
    _INTERACTIVE,
    _TTY,
)
_IMAGE_AND_COMMAND: Final = (Argument("IMAGE", complete="image"), _COMMAND)

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
            "isopod run -d --name web -m 64m --cpus 0.5 -v ./site:/www:ro isopod/busybox httpd -f -h /www",
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
        options=(Option("-a --all", "also those that do not run"), _FORMAT, _QUIET),
        examples=("isopod ps -a", "isopod ps --format json"),
        method="container.list",
    ),
    Command(
        ("logs", "container logs"),
        "print what a container wrote",
        about="With -f a restart of the node is waited for (a minute at most) and bridged: nothing is lost, nothing comes twice.",
        arguments=(_CONTAINER,),
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
        arguments=(_CONTAINERS,),
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
        arguments=(_CONTAINERS,),
        options=(Option("-t --time", "how long to wait before SIGKILL: 30, 1m", "SECONDS", default="10"),),
        examples=("isopod stop web", "isopod stop -t 1m db web"),
        method="container.stop",
    ),
    Command(
        ("kill", "container kill"),
        "send a signal to a container's first process",
        arguments=(_CONTAINERS,),
        options=(Option("-s --signal", "which one: a name or a number", "SIGNAL", default="KILL", complete="signal"),),
        examples=("isopod kill web", "isopod kill -s HUP web"),
        method="container.kill",
    ),
    Command(
        ("rm", "container rm", "container remove"),
        "remove containers that do not run",
        arguments=(_CONTAINERS,),
        options=(Option("-f --force", "kill them first if they run"),),
        examples=("isopod rm web", "isopod rm -f web db"),
        method="container.remove",
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
        arguments=(_CONTAINERS,),
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
        arguments=(_CONTAINERS,),
        method="container.inspect",
    ),
    Command(
        ("commit", "container commit"),
        "make an image of a container's files",
        arguments=(_CONTAINER, Argument("IMAGE")),
        examples=("isopod commit box my/box:1",),
        method="container.commit",
    ),
)

IMAGE_COMMANDS: Final = (
    Command(
        ("images", "image ls", "image list"),
        "list images",
        options=(_FORMAT, _QUIET),
        method="image.list",
    ),
    Command(
        ("import", "image import"),
        "make an image of a root file system",
        about="SOURCE is a tar file (plain, gzip or zstd), a folder, or - for a tar on standard input.",
        arguments=(Argument("SOURCE", complete="file"), Argument("IMAGE")),
        examples=(
            "isopod import rootfs.tar.gz my/base",
            "isopod import ./rootfs my/base:2",
            "debootstrap --variant=minbase bookworm root && isopod import root debian",
        ),
        method="image.import",
    ),
    Command(
        ("load", "image load"),
        "take the images of an archive made by `docker save` or in the OCI layout",
        about="Without -i the archive is read from standard input.",
        options=(Option("-i --input", "the archive, or a folder in the OCI layout", "FILE", default="standard input", complete="file"),),
        examples=("isopod load -i alpine.tar", "docker save alpine | isopod load"),
        method="image.load",
    ),
    Command(
        ("rmi", "image rm", "image remove"),
        "remove images",
        arguments=(_IMAGES,),
        examples=("isopod rmi my/base:2",),
        method="image.remove",
    ),
    Command(
        ("image inspect",),
        "print all about images, as JSON",
        arguments=(_IMAGES,),
        method="image.inspect",
    ),
)

NETWORK_COMMANDS: Final = (
    Command(
        ("network create",),
        "create a bridge network",
        arguments=(Argument("NAME"),),
        options=(
            Option("--subnet", "its addresses: 10.9.0.0/24", "CIDR", default="a free one"),
            Option("--driver", "its kind", "DRIVER", default="bridge", choices=("bridge",)),
        ),
        examples=("isopod network create --subnet 10.9.0.0/24 backend",),
        method="network.create",
    ),
    Command(
        ("network ls", "network list"),
        "list networks",
        options=(_FORMAT, _QUIET),
        method="network.list",
    ),
    Command(
        ("network inspect",),
        "print all about networks, as JSON",
        arguments=(_NETWORKS,),
        method="network.inspect",
    ),
    Command(
        ("network rm", "network remove"),
        "remove networks that no container uses",
        arguments=(_NETWORKS,),
        method="network.remove",
    ),
)

NODE: Final = Command(
    ("node",),
    "run the daemon in the foreground",
    about="Every option is also an environment variable (ISOPOD_POOL_SIZE) and a key of the configuration file (pool_size; paths in "
    "the table [paths]). An option beats a variable, a variable beats the file.",
    options=(
        Option("--config", "the configuration file", "FILE", default="/etc/isopod/config.toml", complete="file"),
        Option("--layout", "where files go by default", "LAYOUT", default="isopod", choices=("isopod", "rtain")),
        Option("--runtime", "the OCI runtime", "NAME", default="auto", choices=("auto", "crun", "runc")),
        Option("--prefix", "begins the names of bridges, tables and cgroups", "PREFIX", default="made from --root"),
        Option("--socket-group", "the group that may use the socket", "GROUP", default="isopod"),
        Option("--log-level", "the least level logged", "LEVEL", default="info", choices=("debug", "info", "warning", "error")),
        Option("--event-loop", "the event loop", "NAME", default="uvloop", choices=("uvloop", "asyncio", "polling")),
        Option("--pool-size", "prepared network namespaces kept ready", "N", default="8"),
        Option("--shards", "processes that share the work, 0 for one on each processor", "N", default="1"),
        Option("--telemetry", "where metrics, health and the dashboard are served; without a password", "ADDRESS", default="nowhere"),
        Option("--default-subnet", "the subnet of the network called bridge", "CIDR", default="10.88.0.0/24"),
    ),
    examples=("isopod node", "isopod node --root /srv/isopod --run-root /run/isopod2"),
    rest=True,
)
"""The daemon reads its own words (`isopod.node.main`); here they stand for help. Paths are added from `isopod.world.paths`."""

SYSTEM_COMMANDS: Final = (
    Command(
        ("info",),
        "print what the node is and what it found on this machine",
        options=(_FORMAT,),
        method="system.info",
    ),
    Command(
        ("version",),
        "print the versions of this program and of the node",
        options=(_FORMAT,),
        method="system.version",
    ),
    Command(
        ("debug tasks",),
        "list what the node is doing: its tasks, what each waits for, since when, in which scheduling group",
        options=(_FORMAT,),
        method="system.tasks",
    ),
    NODE,
    Command(
        ("config show",),
        "print the settings a node would have, with defaults, files and this environment",
        about="Needs no node. Files, drop-ins (config.d beside config.toml) and variables are looked at as `isopod node` does.",
        options=(
            Option("--origin", "say where each value comes from"),
            Option("--config", "the configuration file", "FILE", default="/etc/isopod/config.toml", complete="file"),
            Option("--format", "how to print", "FORMAT", default="table", choices=("table", "json", "toml")),
        ),
        examples=("isopod config show --origin", "isopod config show --format toml > /etc/isopod/config.toml"),
    ),
    Command(
        ("config check",),
        "say whether a configuration file is sound",
        about="TOML, YAML or JSON, by its ending. Only this file is looked at, not its drop-ins and not the environment.",
        arguments=(Argument("FILE", complete="file"),),
        examples=("isopod config check ./config.toml",),
    ),
    Command(
        ("completion",),
        "print a script that teaches a shell to complete these commands",
        arguments=(Argument("SHELL", complete="shell"),),
        examples=(
            "isopod completion bash > /etc/bash_completion.d/isopod",
            "isopod completion zsh > /usr/share/zsh/vendor-completions/_isopod",
            "isopod completion fish > ~/.config/fish/completions/isopod.fish",
        ),
    ),
    Command(
        ("help",),
        "explain a command",
        arguments=(Argument("COMMAND", many=True, optional=True, complete="command"),),
        examples=("isopod help run",),
    ),
)

SECTIONS: Final = (
    ("Containers", CONTAINER_COMMANDS),
    ("Images", IMAGE_COMMANDS),
    ("Networks", NETWORK_COMMANDS),
    ("System", SYSTEM_COMMANDS),
)
GROUPS: Final = (
    ("container", "all about containers"),
    ("image", "all about images"),
    ("network", "all about networks"),
    ("config", "the node's settings, without a node"),
    ("debug", "look into a live node"),
)
"""First words of two-word commands."""
COMMANDS: Final = (*CONTAINER_COMMANDS, *IMAGE_COMMANDS, *NETWORK_COMMANDS, *SYSTEM_COMMANDS)

EXIT_CODES: Final = (
    (0, "done; detached from a container that goes on"),
    (1, "refused: no such object, wrong state, in use, a name or range is taken"),
    (2, "the command line or a value in it makes no sense"),
    (3, "the node cannot be reached, went away, was too late, or speaks another protocol"),
    (4, "the kernel, a disk or a helper program failed; trying again may help"),
    (5, "damaged or hostile data: an archive, a record"),
    (70, "a bug in isopod"),
    (125, "run, exec and attached start: isopod itself failed, whatever the reason"),
    (126, "run, exec and attached start: the command was found but cannot be executed"),
    (127, "run, exec and attached start: the command was not found"),
    (130, "ended by ctrl-c; 128 + N for signal N in general"),
    (141, "whoever read the output closed it"),
)


def find(words: list[str]) -> tuple[Command | None, int]:
    """Return the command that `words` begin with, and how many words its name takes; (None, 0) if there is none."""
    for n_words in (2, 1):
        name = " ".join(words[:n_words])
        if len(words) >= n_words:
            for command in COMMANDS:
                if name in command.names:
                    return command, n_words
    return None, 0
