"""Policy: what of a sandbox's figures is taken in: relabelling, namespaces, budgets, and families that are taken rarely.

    metric_relabel_configs:                  # Prometheus' syntax (`relabel`)
      - {source_labels: [__name__], regex: kata_shim_go_.*, action: drop}
    namespaces: {allow: [prod, staging]}     # or {deny: [kube-system]}
    series_budgets: {default: 50000, namespaces: {prod: 200000}}
    family_intervals_s: {kata_guest_vm_stat: 300}

It lies in a file that is read again while the agent runs; one that makes no sense leaves what holds. A change holds for each sandbox
from its next round on.

With `allow`, a sandbox of which nobody has said whose it is shows nothing. A budget counts series after relabelling; a sandbox that does
not fit in what its namespace has left shows nothing, and is tried again each round: who was there first stays. Of a family with an
interval, the lines of a round that comes too early are those of the last one that was taken.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.followed import READ_HINT
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Families, Pod
from isopod.pulse.relabel import Protected, Relabeler, RuleConfig
from isopod.runtime.logger import Logger
from isopod.world.clock import Clock
from isopod.world.disk import Disk
from isopod.world.errors import InvalidArgument, UnavailableError, from_os_error

FILE_BYTES_MAX: Final = 1 << 20
REREAD_S: Final = 5.0
WHY_CHARS_MAX: Final = 200
"""Of what is told about a value that makes no sense."""
OVER_BUDGET: Final = "budget"
"""Why lines were left out: their namespace's budget."""
HIDDEN: Final = "namespace"
"""Why lines were left out: their namespace is not shown."""
RELABELLED: Final = "relabelled"
"""Why lines were left out: a rule said so."""

PROTECTED: Final = Protected(
    [name for name, _ in (*kata_labels("", None), *cadvisor_labels("", None))],
    ("label_", "annotation_"),
)
"""The labels that say whose a series is."""

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=0, le=10**9)]


class Namespaces(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which are shown: those of `allow`, or all if it is not there, but those of `deny`."""

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()


class Budgets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many series a namespace may have."""

    default: Count | None = None
    namespaces: dict[str, Count] = {}


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's contents. The keys' meaning stands above."""

    metric_relabel_configs: tuple[RuleConfig, ...] = ()
    namespaces: Namespaces = Namespaces()
    series_budgets: Budgets = Budgets()
    family_intervals_s: dict[str, Seconds] = {}


class Taken(NamedTuple):
    """What of a round is shown.

    Args:
        families: The kata_* families.
        containers: Those under cAdvisor's names.
        dropped: Series left out, by reason.
    """

    families: Families
    containers: Families
    dropped: Mapping[str, int]


class Policy:
    """One policy, and what it has to remember.

    Args:
        config: What it says.

    Raises:
        InvalidArgument: A rule makes no sense.
    """

    def __init__(self, config: PolicyConfig = PolicyConfig()) -> None:  # noqa: B008 - immutable
        self.config = config
        self._relabeler = Relabeler(config.metric_relabel_configs, PROTECTED)
        self._intervals = tuple(config.family_intervals_s.items())
        self._taken_s: dict[str, dict[str, float]] = {}
        """By sandbox and family, when its lines were taken last."""
        self._charged: dict[str, tuple[str, int]] = {}
        """By sandbox: whose budget bears it, and how many series."""
        self._used: dict[str, int] = {}
        self.is_open = config == PolicyConfig()
        """Whether it lets everything through."""

    def take(self, identifier: str, pod: Pod | None, families: Families, *, containers: Families, before: Families, now_s: float) -> Taken:
        """Return what of a round is shown.

        Args:
            identifier: The sandbox.
            pod: Whose it is; None while nobody has said.
            families: What its shim said.
            containers: The same under cAdvisor's names.
            before: What is shown of it now.
            now_s: By a clock that never goes back.
        """
        if self.is_open:
            return Taken(families, containers, {})
        n_all = _count(families) + _count(containers)
        namespace = "" if pod is None else pod.namespace
        if not self._shows(pod):
            self.forget(identifier)
            return Taken({}, {}, {HIDDEN: n_all})
        kept, n_dropped = self._relabeler.apply(families)
        containers, n_dropped_too = self._relabeler.apply(containers)
        n_dropped += n_dropped_too
        if self._intervals:
            kept = self._rare(identifier, kept, before, now_s)
        dropped = {RELABELLED: n_dropped} if n_dropped else {}
        if not self._fits(identifier, namespace, _count(kept) + _count(containers)):
            return Taken({}, {}, {**dropped, OVER_BUDGET: _count(kept) + _count(containers)})
        return Taken(kept, containers, dropped)

    def forget(self, identifier: str) -> None:
        """Let go of a sandbox: its share of a budget is free."""
        self._taken_s.pop(identifier, None)
        self._release(identifier)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _shows(self, pod: Pod | None) -> bool:
        told = self.config.namespaces
        if told.allow is not None and (pod is None or pod.namespace not in told.allow):
            return False
        return pod is None or pod.namespace not in told.deny

    def _rare(self, identifier: str, families: Families, before: Families, now_s: float) -> Families:
        taken_s = self._taken_s.setdefault(identifier, {})
        shown: Families = {}
        for name, fragment in families.items():
            interval_s = max((seconds for prefix, seconds in self._intervals if name.startswith(prefix)), default=0.0)
            last = before.get(name)
            if interval_s and last is not None and now_s - taken_s.get(name, -interval_s) < interval_s:
                shown[name] = last
                continue
            if interval_s:
                taken_s[name] = now_s
            shown[name] = fragment
        return shown

    def _fits(self, identifier: str, namespace: str, n_series: int) -> bool:
        told = self.config.series_budgets
        budget = told.namespaces.get(namespace, told.default)
        self._release(identifier)
        if budget is None:
            return True
        used = self._used.get(namespace, 0)
        if used + n_series > budget:
            return False
        self._used[namespace] = used + n_series
        self._charged[identifier] = (namespace, n_series)
        return True

    def _release(self, identifier: str) -> None:
        namespace, n_series = self._charged.pop(identifier, ("", 0))
        if n_series:
            left = self._used[namespace] - n_series
            if left:
                self._used[namespace] = left
            else:
                del self._used[namespace]


def parse_policy(text: bytes, path: str) -> Policy:
    """Return the policy that a file's contents are: YAML, or JSON.

    Args:
        text: The contents; empty ones let everything through.
        path: The file, for messages.

    Raises:
        InvalidArgument: They make no sense.
    """
    import yaml  # noqa: PLC0415  only an agent that has a policy pays for it

    try:
        told: Any = yaml.safe_load(text.decode())
    except UnicodeDecodeError:
        raise InvalidArgument("policy", path, "not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidArgument("policy", path, " ".join(str(error).split())) from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # YAML's types are not checked before they are made: 2020-02-30 is written as a day, and `!!int x` as a number.
        why = f"a value is not of its type: {' '.join(str(error).split())[:WHY_CHARS_MAX]}"
        raise InvalidArgument("policy", path, why, "put texts into quotes") from None
    try:
        config = msgspec.convert(told if told is not None else {}, PolicyConfig)
        msgspec.json.encode(config)  # a text may have halves of characters, which nothing could show
    except UnicodeEncodeError:
        raise InvalidArgument("policy", path, "a text in it is no Unicode", "leave out escapes from \\uD800 to \\uDFFF") from None
    except (msgspec.ValidationError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise InvalidArgument("policy", path, str(error)[:WHY_CHARS_MAX]) from None
    return Policy(config)


async def read_policy(disk: Disk, path: str) -> Policy:
    """Return the policy of a file.

    Raises:
        UnavailableError: It cannot be read.
        InvalidArgument: It makes no sense.
    """
    try:
        text = await disk.read(path, n_bytes_max=FILE_BYTES_MAX)
    except OSError as error:
        failure = from_os_error(error, "read the policy", path)
        raise UnavailableError(failure.message, failure.hint or READ_HINT) from error
    return parse_policy(text, path)


def _count(families: Families) -> int:
    return sum(fragment.n_series for fragment in families.values())


class PolicyState(NamedTuple):
    """How it stands with a policy's file.

    Args:
        file: Its path.
        config: What holds.
        read_at_ns: When what holds was read, since the Unix epoch.
        error: Why what the file says now cannot hold, "" if it does.
    """

    file: str
    config: PolicyConfig
    read_at_ns: int
    error: str


class PolicyFile:
    """A policy that follows its file.

    Args:
        disk: Where it lies.
        path: The file.
        on_change: Given each new policy.
        clock: Says when it was read.
        logger: Told of new ones, and of what makes no sense.
    """

    def __init__(self, disk: Disk, path: str, *, on_change: Callable[[Policy], None], clock: Clock, logger: Logger) -> None:
        self.path: Final = path
        self._disk = disk
        self._on_change = on_change
        self._clock = clock
        self._logger = logger
        self._asked = asyncio.Event()
        self._reading = asyncio.Lock()  # of two reads at one time the older one must not win
        self._config = PolicyConfig()
        self._read_at_ns = 0
        self._error = ""

    @property
    def is_good(self) -> bool:
        """Whether what holds is what the file says."""
        return not self._error

    def state(self) -> PolicyState:
        """Return how it stands."""
        return PolicyState(self.path, self._config, self._read_at_ns, self._error)

    async def open(self) -> None:
        """Read it for the first time.

        Raises:
            UnavailableError: It cannot be read.
            InvalidArgument: It makes no sense.
        """
        self._take(await read_policy(self._disk, self.path))

    def ask(self) -> None:
        """Read it again now."""
        self._asked.set()

    async def follow(self) -> None:
        """Read it again and again until cancelled; what makes no sense leaves what holds."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REREAD_S):
                    await self._asked.wait()
            self._asked.clear()
            with suppress(UnavailableError, InvalidArgument):
                await self.reload()

    async def reload(self) -> None:
        """Read it again at once. Raises as `open`; what held before then holds on, and the log says why."""
        async with self._reading:
            try:
                policy = await read_policy(self._disk, self.path)
            except (UnavailableError, InvalidArgument) as error:
                if error.message != self._error:
                    self._logger.error("pulse.policy_refused", why=error.message)
                self._error = error.message
                raise
            self._error = ""
            if policy.config != self._config:
                self._take(policy)
                self._logger.info("pulse.policy", file=self.path)
            else:
                self._read_at_ns = self._clock.now_ns()

    def _take(self, policy: Policy) -> None:
        self._config = policy.config
        self._read_at_ns = self._clock.now_ns()
        self._on_change(policy)
