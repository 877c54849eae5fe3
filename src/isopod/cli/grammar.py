"""The grammar of the command line, as data: every command with its arguments, options, examples and the RPC method behind it.

From these tables come parsing (`parse`), help (`manual`), completion (`completion`) and docs/cli.md (`reference`): what is not
said here does not exist. Nothing is computed but the tables, and nothing but their parts is imported: every call pays for this file.
The commands about containers are in `grammar_containers`, what tables are made of in `grammar_parts`.

The docker words are kept: a command that docker has twice (`ps`, `container ls`) is one command with several names here.
"""

from __future__ import annotations

from isopod.cli.grammar_containers import CONTAINER_COMMANDS
from isopod.cli.grammar_parts import CONTAINER, FORMAT, IMAGES, JOURNAL, NETWORKS, QUIET, Argument, Command, Option
from isopod.cli.grammar_vm import VM_COMMANDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


PROGRAM: Final = "isopod"
ABOUT: Final = "Run containers and virtual machines on this machine."

HELP: Final = Option("-h --help", "show help and do nothing else")
SOCKET: Final = Option("-H --socket", "the node's socket", "PATH", default="ISOPOD_SOCKET, else the config file's", complete="file")
GLOBAL_OPTIONS: Final = (SOCKET, HELP)
"""Allowed before and after the command's name."""
VERSION: Final = Option("--version", "print the version of this program and do nothing else")

IMAGE_COMMANDS: Final = (
    Command(
        ("images", "image ls", "image list"),
        "list images",
        options=(FORMAT, QUIET),
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
        arguments=(IMAGES,),
        examples=("isopod rmi my/base:2",),
        method="image.remove",
    ),
    Command(
        ("image inspect",),
        "print all about images, as JSON",
        arguments=(IMAGES,),
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
        options=(FORMAT, QUIET),
        method="network.list",
    ),
    Command(
        ("network inspect",),
        "print all about networks, as JSON",
        arguments=(NETWORKS,),
        method="network.inspect",
    ),
    Command(
        ("network rm", "network remove"),
        "remove networks that no container uses",
        arguments=(NETWORKS,),
        method="network.remove",
    ),
    Command(
        ("network connect",),
        "put a container on a network",
        about="A container is on one network at most. One that runs gets its link at once; the host's network at its next start.",
        arguments=(Argument("NETWORK", complete="network"), CONTAINER),
        examples=("isopod network connect backend web",),
        method="network.connect",
    ),
    Command(
        ("network disconnect",),
        "take a container off its network",
        about="One that runs loses its link at once and keeps its loopback.",
        arguments=(Argument("NETWORK", complete="network"), CONTAINER),
        examples=("isopod network disconnect backend web",),
        method="network.disconnect",
    ),
)

_CLUSTER_NODE_OPTIONS: Final = (
    Option("--id", "this node's id in its cluster, never used twice", "N", default="1"),
    Option("--bind", "where other nodes reach this one; makes it a node of a cluster", "HOST:PORT", default="none: in no cluster"),
    Option("--advertise", "the same as the others see it, if that differs", "HOST:PORT", default="what --bind says"),
    Option("--data-dir", "the cluster's state; without --root the engine's data lies there too", "FOLDER", default="{root}/cluster"),
    Option("--peer --peers", "the nodes that form the cluster together, this one among them", "[ID:]HOST:PORT", repeatable=True),
    Option("--join", "a member to join by", "HOST:PORT", repeatable=True),
    Option("--token", "what lets this node in, or a secret of all that form a cluster", "TOKEN", default="ISOPOD_CLUSTER_TOKEN"),
    Option("--join-cluster", "join the peers, never found a cluster"),
    Option("--init-primary", "found the cluster, unless a peer is in one already"),
    Option("--init-secondary", "the same as --join-cluster"),
    Option(
        "--role",
        "containers and a replica, a replica only, or containers only",
        "ROLE",
        default="node",
        choices=("node", "control", "agent"),
    ),
    Option("--voters-max", "how many vote at most in a cluster it founds (cluster set)", "N", default="5", choices=("1", "3", "5", "7")),
    Option("--grpc-listen", "where gRPC is served; where other machines reach it, by mutual TLS only", "ADDRESS", default="nowhere"),
    Option(
        "--pulse-listen",
        "where metrics of this node's containers and machines, and of Kata's sandboxes, are served",
        "ADDRESS",
        default="nowhere",
    ),
)

NODE: Final = Command(
    ("node",),
    "run the daemon in the foreground",
    about="Every option is also an environment variable (ISOPOD_POOL_SIZE) and a key of the configuration file (pool_size; paths in "
    "the table [paths]; the cluster's are ISOPOD_CLUSTER_BIND and, in the table [cluster], bind). An option beats a variable, a variable "
    "beats the file.",
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
        Option(
            "--layers",
            "how layers are kept: mounted, or as folders",
            "FORM",
            default="auto",
            choices=("auto", "erofs", "directory"),
        ),
        Option("--default-subnet", "the subnet of the network called bridge", "CIDR", default="10.88.0.0/24"),
        *_CLUSTER_NODE_OPTIONS,
    ),
    examples=(
        "isopod node",
        "isopod node --root /srv/isopod --run-root /run/isopod2",
        "isopod node --id 1 --bind 10.0.0.1:7000 --data-dir /srv/isopod",
        "isopod node --id 2 --bind 10.0.0.2:7000 --data-dir /srv/isopod --join 10.0.0.1:7000 --token TOKEN",
    ),
    rest=True,
)
"""The daemon reads its own words (`isopod.node.main`); here they stand for help. Paths are added from `isopod.world.paths`."""

_TIMEOUT: Final = Option("--timeout", "how long to wait for the answer: 5, 1m", "SECONDS", default="5")
_NODE_ID: Final = Argument("NODE")
_IF_REVISION: Final = Option("--if-revision", "only if the key was last changed at this revision; 0: only if it is not there", "REVISION")
_CONSISTENCY: Final = Option(
    "--consistency", "how new the answer must be", "KIND", default="linearizable", choices=("linearizable", "cached", "stale")
)

CLUSTER_COMMANDS: Final = (
    Command(
        ("cluster status",),
        "print who leads, the term, and every node with its state",
        options=(Option("--addr", "ask another node: its id or HOST:PORT", "NODE", default="the local node"), _TIMEOUT, FORMAT),
        examples=("isopod cluster status", "isopod cluster status --addr 10.0.0.2:7000 --format json"),
        method="cluster.status",
    ),
    Command(
        ("cluster members", "cluster ls"),
        "list the nodes of the cluster",
        options=(_TIMEOUT, FORMAT),
        method="cluster.members",
    ),
    Command(
        ("cluster join",),
        "bring the local node, which waits for that, into a member's cluster",
        about="For a node that was started with --join-cluster and without peers, or that tries in vain. One that founded a cluster of its "
        "own stays in it.",
        arguments=(Argument("HOST:PORT"),),
        options=(Option("--token", "the join token", "TOKEN", default="ISOPOD_CLUSTER_TOKEN"), _TIMEOUT, FORMAT),
        examples=("isopod cluster join 10.0.0.1:7000 --token isopod-join-...",),
        method="cluster.join",
    ),
    Command(
        ("cluster leave", "cluster remove"),
        "take another node out of the cluster: demoted first, then removed",
        about="A node does not take itself out: ask another one. What was removed comes back only with an empty data folder and a new "
        "token.",
        arguments=(_NODE_ID,),
        options=(_TIMEOUT, FORMAT),
        examples=("isopod cluster leave 3",),
        method="cluster.leave",
    ),
    Command(
        ("cluster promote",),
        "have a learner vote, as soon as it has caught up",
        arguments=(_NODE_ID,),
        options=(_TIMEOUT, FORMAT),
        method="cluster.promote",
    ),
    Command(
        ("cluster demote",),
        "have a voter only replicate",
        arguments=(_NODE_ID,),
        options=(_TIMEOUT, FORMAT),
        method="cluster.demote",
    ),
    Command(
        ("cluster transfer",),
        "hand leadership over, to a node or to who is most fit",
        arguments=(Argument("NODE", optional=True),),
        options=(_TIMEOUT, FORMAT),
        examples=("isopod cluster transfer 2",),
        method="cluster.transfer",
    ),
    Command(
        ("cluster set",),
        "change a setting of the whole cluster, while it runs",
        about="With more room among the voters, learners that wait for it are promoted; with less, the dead are demoted first, the "
        "leader last.",
        options=(Option("--voters-max", "how many nodes vote at most", "N", choices=("1", "3", "5", "7")), _TIMEOUT, FORMAT),
        examples=("isopod cluster set --voters-max 3",),
        method="cluster.set",
    ),
    Command(
        ("cluster token",),
        "make, list and revoke join tokens",
        about="ACTION is create, list or revoke. A new token is printed once and kept nowhere.",
        arguments=(Argument("ACTION", complete="token action"), Argument("ID", optional=True)),
        options=(
            Option("--valid", "how long it lets nodes in: 1h, 30m", "TIME", default="1h"),
            Option("--uses", "how many nodes may come in by it", "N", default="1"),
            Option("--role", "the most they may become", "ROLE", default="voter", choices=("voter", "learner", "agent")),
            _TIMEOUT,
            FORMAT,
        ),
        examples=("isopod cluster token create --uses 2", "isopod cluster token list", "isopod cluster token revoke 1f0c33a98b21"),
    ),
    Command(
        ("cluster check",),
        "compare the replicas: whether all nodes hold the same state",
        options=(_TIMEOUT, FORMAT),
        method="kv.consistency",
    ),
    Command(
        ("cluster backup",),
        "write all that is replicated into a file, while the cluster runs",
        about="Who is in the cluster, and its tokens, are left out: a backup goes into any cluster.",
        arguments=(Argument("FILE", complete="file"),),
        examples=("isopod cluster backup cluster.backup",),
        method="cluster.backup",
    ),
    Command(
        ("cluster restore",),
        "have the cluster hold what a backup holds",
        arguments=(Argument("FILE", complete="file"),),
        options=(Option("--force", "also if the cluster holds something, which is lost then"),),
        examples=("isopod cluster restore cluster.backup",),
        method="cluster.restore",
    ),
    Command(
        ("cluster recover",),
        "make a new cluster of one stopped node's replica: when more than half of the voters are lost for good",
        about="Needs no running node. Without --yes it only says what it would do, and what may be lost. The old data is kept aside, and "
        "no node of the old cluster is let into the new one: they join it anew, with empty data folders.",
        arguments=(Argument("FOLDER", complete="folder"),),
        options=(Option("--yes", "do it"), FORMAT),
        examples=("isopod cluster recover /srv/isopod", "isopod cluster recover --yes /srv/isopod"),
    ),
)
"""Without a node's socket only `recover` works."""

SYSTEM_COMMANDS: Final = (
    Command(
        ("info",),
        "print what the node is and what it found on this machine",
        options=(FORMAT,),
        method="system.info",
    ),
    Command(
        ("version",),
        "print the versions of this program and of the node",
        options=(FORMAT,),
        method="system.version",
    ),
    Command(
        ("system df",),
        "print what all containers may use, what they use, and what lies on the disk",
        about="Limits and measured use are apart: a limit that is not set counts as unlimited, not as zero.",
        options=(FORMAT,),
        method="system.usage",
    ),
    Command(
        ("backup",),
        "save all records and networks of a running node in a file",
        about="The copy is of one moment; the node goes on meanwhile. Images and the files of containers are not in it.",
        arguments=(Argument("FILE", complete="file"),),
        examples=("isopod backup /srv/isopod.backup",),
        method="system.backup",
    ),
    Command(
        ("restore",),
        "put a backup of records and networks back, while no node runs",
        about="The records from before stay beside it (metadata.before-restore-N). Records of containers that ran are corrected at the "
        "next start. Files of containers that the backup does not know would be removed then: such a backup needs --force.",
        arguments=(Argument("FILE", complete="file"),),
        options=(
            Option("--config", "the node's configuration file", "FILE", default="/etc/isopod/config.toml", complete="file"),
            Option("--root", "the node's folder of durable data", "FOLDER", complete="folder"),
            Option("--run-root", "the node's folder of what need not survive a reboot", "FOLDER", complete="folder"),
            Option("--force", "also if files of containers will be removed because of it"),
        ),
        examples=("isopod restore /srv/isopod.backup",),
    ),
    Command(
        ("debug tasks",),
        "list what the node is doing: its tasks, what each waits for, since when, in which scheduling group",
        options=(FORMAT,),
        method="system.tasks",
    ),
    NODE,
    Command(
        ("sim",),
        "run a whole cluster in the simulation, break it, and check every promise",
        about="Nodes, network, disks and clocks are simulated; one seed decides everything, so a run can be repeated exactly. FILE is a "
        "scenario file that --shrink printed. The seed is --seed, else ISOPOD_SIM_SEED, else MADSIM_TEST_SEED, else 12345. The exit "
        "code is 1 if a promise was broken.",
        arguments=(Argument("FILE", optional=True, complete="file"),),
        options=(
            Option("--seed", "decides everything", "N", default="12345"),
            Option("--seeds", "run with each of these seeds", "FIRST..LAST"),
            Option("--runs", "run with so many seeds, from --seed on", "N", default="1"),
            Option("--scenario", "which faults may happen; all for one run of each", "NAME", default="everything"),
            Option("--nodes", "how many nodes vote", "N", default="the scenario's"),
            Option("--until", "how long faults and clients go on, in virtual time: 20s, 1m", "TIME", default="the scenario's"),
            Option("--digest", "print nothing but the digest of all that happened"),
            Option("--trace", "write what happened to a file, - for standard output", "FILE", complete="file"),
            Option("--shrink", "make the first failing run as small as possible and print it as a scenario file"),
            Option("--list", "list the scenarios and do nothing else"),
            Option("--format", "how to print", "FORMAT", default="text", choices=("text", "json")),
        ),
        examples=(
            "isopod sim",
            "isopod sim --scenario partitions --seeds 1..20",
            "isopod sim --seed 7 --digest",
            "isopod sim --seed 7 --shrink > failing.json",
        ),
    ),
    Command(
        ("journal verify",),
        "check every byte of a journal: records, archive and snapshots",
        about="FOLDER holds current.wal, and belongs to a node that is stopped. Nothing is changed. The exit code is 5 if something is "
        "damaged; a write that a crash cut off is no damage, for nothing of it was acknowledged.",
        arguments=(JOURNAL,),
        options=(FORMAT,),
        examples=("isopod journal verify /var/lib/isopod/metadata", "isopod journal verify --format json ./metadata"),
    ),
    Command(
        ("journal dump",),
        "print the records of a journal, a line each",
        about="Needs a stopped node. What is damaged is said on standard error, and what can be read behind it goes on; the exit code is "
        "then 5.",
        arguments=(JOURNAL,),
        options=(
            Option("--from", "begin with this record", "LSN"),
            Option("--limit", "print so many at most", "N"),
            FORMAT,
        ),
        examples=("isopod journal dump --from 100 --limit 10 ./metadata", "isopod journal dump --format json ./metadata"),
    ),
    Command(
        ("journal compact",),
        "let the records go that the newest snapshot covers",
        about="Needs a stopped node. They stay in the archive for as long as --keep allows.",
        arguments=(JOURNAL,),
        options=(
            Option("--keep", "closed segments of history that stay", "N", default="10"),
            Option("--no-compress", "leave closed segments as they are"),
        ),
        examples=("isopod journal compact ./metadata", "isopod journal compact --keep 0 ./metadata"),
    ),
    Command(
        ("journal repair",),
        "make a damaged journal usable again, and say first what would be lost",
        about="Needs a stopped node. Without --yes nothing is changed, and the exit code is 1 if there is something to do. What is "
        "replaced is kept in FOLDER/damaged-N.",
        arguments=(JOURNAL,),
        options=(Option("--yes", "do it"), FORMAT),
        examples=("isopod journal repair ./metadata", "isopod journal repair --yes ./metadata"),
    ),
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

KV_COMMANDS: Final = (
    Command(
        ("kv get",),
        "print the value of a key",
        about="The exit code is 1 if there is no such key.",
        arguments=(Argument("KEY"),),
        options=(_CONSISTENCY, _TIMEOUT, FORMAT),
        examples=("isopod kv get jobs/a", "isopod kv get --consistency stale --format json jobs/a"),
        method="kv.read",
    ),
    Command(
        ("kv put", "kv set"),
        "set a key, and print the store's revision",
        about="A VALUE of - is read from standard input. The exit code is 1 if the key was not at the revision that was asked for.",
        arguments=(Argument("KEY"), Argument("VALUE")),
        options=(_IF_REVISION, _TIMEOUT),
        examples=("isopod kv put jobs/a waiting", "isopod kv put --if-revision 7 jobs/a taken", "isopod kv put jobs/b -"),
        method="kv.txn",
    ),
    Command(
        ("kv delete", "kv rm"),
        "remove a key, and print how many went",
        about="The exit code is 1 if none did.",
        arguments=(Argument("KEY"),),
        options=(Option("--prefix", "remove all keys that begin so"), _IF_REVISION, _TIMEOUT),
        examples=("isopod kv delete jobs/a", "isopod kv delete --prefix jobs/"),
        method="kv.txn",
    ),
    Command(
        ("kv list", "kv ls"),
        "list keys, in order",
        arguments=(Argument("PREFIX", optional=True),),
        options=(Option("-q --quiet", "print only the keys"), _CONSISTENCY, _TIMEOUT, FORMAT),
        examples=("isopod kv list", "isopod kv list -q jobs/"),
        method="kv.read",
    ),
    Command(
        ("kv txn",),
        "read and write several keys in one step, if what they depend on is still so",
        about="If all conditions hold, what --then says is done, else what --else says. A condition is WHAT KEY RELATION VALUE, where WHAT "
        "is value, version, mod, create or lease, and RELATION =, !=, < or >; a key that is not there has version 0. An operation is put "
        "KEY VALUE, delete KEY, delete-prefix PREFIX, get KEY or list PREFIX. FILE holds the same as JSON, - is standard input: for keys "
        "with blanks and values that are no text. The exit code is 1 if a condition did not hold.",
        arguments=(Argument("FILE", optional=True, complete="file"),),
        options=(
            Option("--if", "a condition", "CONDITION", repeatable=True),
            Option("--then", "what to do if all hold, in this order", "OPERATION", repeatable=True),
            Option("--else", "what to do if one does not", "OPERATION", repeatable=True),
            _TIMEOUT,
            FORMAT,
        ),
        examples=(
            "isopod kv txn --if 'version lock = 0' --then 'put lock me' --else 'get lock'",
            "isopod kv txn --then 'put a 1' --then 'delete b' --format json",
            "isopod kv txn move.json",
        ),
        method="kv.txn",
    ),
    Command(
        ("kv watch",),
        "print changes of keys as they happen",
        arguments=(Argument("PREFIX", optional=True),),
        options=(Option("--from", "the first change wanted may have this revision", "REVISION", default="what comes"), FORMAT),
        examples=("isopod kv watch jobs/", "isopod kv watch --from 100 --format json"),
        method="kv.watch",
    ),
)
PULSE: Final = Command(
    ("pulse",),
    "serve the metrics of all sandboxes of this machine",
    about="A drop-in for kata-monitor: it finds Kata's sandboxes and isopod's own, asks each shim at the interval, and answers scrapes "
    "from what it has. Flags may begin with one dash. KATA_PULSE_LISTEN, RUNTIME_ENDPOINT, RUST_LOG and KATA_PULSE_METRICS_INTERVAL "
    "are the first four flags; a flag beats a variable. It is also the program kata-pulse.",
    options=(
        Option("--listen-address", "where it serves: HOST:PORT or unix:PATH", "ADDRESS", default="127.0.0.1:8090"),
        Option(
            "--runtime-endpoint",
            "the CRI runtime that knows the pods, or none",
            "PATH",
            default="/run/containerd/containerd.sock",
            complete="file",
        ),
        Option("--log-level", "the least level logged; any other word is info", "LEVEL", default="info"),
        Option("--metrics-interval-secs", "how often each sandbox is asked", "SECONDS", default="60"),
        Option("--go-root", "where Kata's shim in Go has a folder for each sandbox", "FOLDER", default="/run/vc/sbs", complete="folder"),
        Option("--rust-root", "where the one in Rust has them", "FOLDER", default="/run/kata", complete="folder"),
        Option("--node-socket", "the socket of an isopod node whose containers are shown too", "PATH", default="none", complete="file"),
        Option("--view", "what /metrics shows", "VIEW", default="all", choices=("all", "kata", "cadvisor")),
        Option(
            "--cadvisor-without",
            "left out of container_*: cpu, memory, network, disk, process, spec, time, containers",
            "PART",
            repeatable=True,
        ),
        Option("--strict-compat", "be kata-monitor to the letter: its families, codes and parameters"),
        Option("--base-units", "show kata_* in seconds and bytes, counters as counters, under names that say so; not with --strict-compat"),
        Option("--merge-histograms", "show histograms once for all sandboxes, added up; not with --strict-compat"),
        Option("--pod-label", "a label of pods that becomes a label of their series (label_NAME)", "NAME", repeatable=True),
        Option("--pod-annotation", "the same of an annotation (annotation_NAME)", "NAME", repeatable=True),
        Option("--policy-file", "relabelling, budgets and intervals; read again when it changes, and on SIGHUP", "FILE", complete="file"),
        Option("--pause-after", "leave shims alone after so long without a scrape; 0 asks always", "SECONDS", default="0"),
        Option("--keep-rounds", "failed rounds over which a sandbox's last figures are shown", "N", default="2"),
        Option("--shards", "processes that serve scrapes; 0 for as many as the processors ask for", "N", default="0"),
        Option("--in-flight-max", "shims that are asked at one time", "N", default="64"),
        Option("--request-timeout", "what a shim has for a whole answer", "SECONDS", default="3"),
        Option("--tls-cert-file", "PEM of the certificate that is shown; read again when it changes", "FILE", complete="file"),
        Option("--tls-key-file", "PEM of its key", "FILE", complete="file"),
        Option("--tls-client-ca-file", "PEM of the authority that clients must be certified by", "FILE", complete="file"),
        Option("--tls-min-version", "VersionTLS12 or VersionTLS13", "VERSION", default="VersionTLS12"),
        Option("--tls-cipher-suites", "suites of TLS 1.2, by their registered names, with commas; else all that are sound", "NAMES"),
        Option("--token-file", "the file with the token that requests must carry as their bearer", "FILE", complete="file"),
        Option("--basic-auth-file", "the file with lines USER:HASH (bcrypt) of those who may ask by password", "FILE", complete="file"),
        Option("--enable-lifecycle", "answer PUT and POST /-/reload: read policy, TLS files, tokens and users again"),
        Option("--pprof", "pass /debug/ on to shims"),
        Option("--push-url", "send all figures there by Prometheus' remote write: http or https", "URL", default="none"),
        Option("--push-interval", "how often they are sent", "SECONDS", default="60"),
        Option("--push-timeout", "what the receiver has for a whole request", "SECONDS", default="30"),
        Option("--push-queue-bytes", "of requests that wait; the oldest are dropped beyond it", "N", default="67108864"),
        Option("--push-label", "a label for series that have none of the name", "NAME=VALUE", repeatable=True),
        Option(
            "--push-token-file", "the file with the token that is sent as the bearer; read again for each request", "FILE", complete="file"
        ),
        Option("--push-basic-file", "the file with USER:PASSWORD, instead of a token", "FILE", complete="file"),
        Option("--push-ca-file", "PEM of the authority that certifies the receiver, instead of the machine's", "FILE", complete="file"),
        Option("--push-cert-file", "PEM of the certificate that is shown to it", "FILE", complete="file"),
        Option("--push-key-file", "PEM of its key", "FILE", complete="file"),
    ),
    examples=(
        "isopod pulse",
        "isopod pulse --listen-address 0.0.0.0:8090 --metrics-interval-secs 15",
        "isopod pulse --runtime-endpoint none --node-socket /run/isopod/isopod.sock",
        "KATA_PULSE_LISTEN=127.0.0.1:9090 isopod pulse",
        "isopod pulse --push-url http://127.0.0.1:9090/api/v1/write --push-interval 15 --push-label cluster=lab",
    ),
    rest=True,
)

PULSE_COMMANDS: Final = (
    PULSE,
    Command(
        ("pulse demo",),
        "serve the metrics of sandboxes that are made up, for a first look",
        about="Their folders and sockets are in a temporary folder that goes when it ends. Nothing else of this machine is looked at.",
        options=(
            Option("--sandboxes", "how many", "N", default="3"),
            Option("--listen-address", "where it serves: HOST:PORT or unix:PATH", "ADDRESS", default="127.0.0.1:8090"),
        ),
        examples=("isopod pulse demo --sandboxes 10",),
    ),
    Command(
        ("top", "pulse top"),
        "show what sandboxes and containers use, live, as a metrics agent says it",
        about="Needs an agent (isopod pulse, or a node that has one), no node. On a terminal c, m, n and d choose the order and q ends it; "
        "into a pipe one table follows another. Rates are those between the agent's last two rounds; what it does not know is -.",
        options=(
            Option(
                "--address", "where the agent serves: HOST:PORT or unix:PATH", "ADDRESS", default="KATA_PULSE_LISTEN, else 127.0.0.1:8090"
            ),
            Option("--interval", "how often it is asked: 2, 500ms", "TIME", default="2"),
            Option("--sort", "what stands first", "BY", default="cpu", choices=("cpu", "memory", "network", "disk")),
            Option("--once", "print one table and end"),
            Option("--token-file", "the file with the token that the agent wants", "FILE", complete="file"),
            Option("--basic-file", "the file with USER:PASSWORD, instead of a token", "FILE", complete="file"),
            FORMAT,
        ),
        examples=("isopod top", "isopod top --sort memory --once", "isopod top --address unix:/run/pulse.sock --format json"),
    ),
)
DAEMONS: Final = (NODE, PULSE)
"""What reads its own words: the node's are understood by `isopod.node.main`, those of pulse by `isopod.pulse.options`."""


def global_options_of(command: Command) -> tuple[Option, ...]:
    """Return the options of every command that a command has too: the agent asks no node of its own accord, and knows no --socket."""
    return (HELP,) if command is PULSE else GLOBAL_OPTIONS


SECTIONS: Final = (
    ("Containers", CONTAINER_COMMANDS),
    ("Virtual machines", VM_COMMANDS),
    ("Images", IMAGE_COMMANDS),
    ("Networks", NETWORK_COMMANDS),
    ("Cluster", CLUSTER_COMMANDS),
    ("Keys and values", KV_COMMANDS),
    ("Metrics", PULSE_COMMANDS),
    ("System", SYSTEM_COMMANDS),
)
"""All commands, as the reference has them."""
GROUPS: Final = (
    ("container", "all about containers"),
    ("vm", "what only virtual machines have, and their life cycle in other tools' words"),
    ("image", "all about images"),
    ("network", "all about networks"),
    ("cluster", "the nodes that work together"),
    ("kv", "the keys and values that all nodes share"),
    ("system", "what the node as a whole uses, and what happens"),
    ("config", "the node's settings, without a node"),
    ("pulse", "the metrics of sandboxes"),
    ("journal", "look into the files of a stopped node, and mend them"),
    ("debug", "look into a live node"),
)
"""First words of two-word commands."""
COMMANDS: Final = (
    *CONTAINER_COMMANDS,
    *VM_COMMANDS,
    *IMAGE_COMMANDS,
    *NETWORK_COMMANDS,
    *CLUSTER_COMMANDS,
    *KV_COMMANDS,
    *PULSE_COMMANDS,
    *SYSTEM_COMMANDS,
)

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
