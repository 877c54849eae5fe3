r"""Relabel: Prometheus' relabelling, for series on their way into the store.

    - source_labels: [__name__]
      regex: kata_shim_go_.*
      action: drop

Actions: replace, keep, drop, keepequal, dropequal, hashmod, labelmap, labeldrop, labelkeep, lowercase, uppercase. Expressions are RE2's,
anchored at both ends; `replacement` knows $1, ${1} and ${name}. Labels that begin with two underscores are scratch paper and go at the end;
`__name__` is the name of the series.

The labels that say whose a series is (the block with which each line begins) can be read, and not changed: two sandboxes would become one
series. A rule that names one of them as its target is refused; labeldrop and the like leave them alone.

What was decided is remembered, for a bounded number of series: by name where the name alone decides, else by the text of a series, without
the labels of its sandbox where no rule looks at them.
Source: Prometheus' documentation of <relabel_config>; its hashmod takes the last eight bytes of the MD5 of the joined values.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from isopod.pulse import core
from isopod.pulse.labels import escaped
from isopod.pulse.model import Families, Fragment
from isopod.pulse.patterns import compile_whole
from isopod.world.errors import InvalidArgument

Action = Literal[
    "replace",
    "keep",
    "drop",
    "keepequal",
    "dropequal",
    "hashmod",
    "labelmap",
    "labeldrop",
    "labelkeep",
    "lowercase",
    "uppercase",
]

NAME: Final = "__name__"
RULES_MAX: Final = 200
KNOWN_MAX: Final = 20_000
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_PAIR: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', re.DOTALL)
_HEAD: Final = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? ', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_REFERENCE: Final = re.compile(r"\$(?:\$|([0-9]+|[A-Za-z_][A-Za-z0-9_]*)|\{([0-9]+|[A-Za-z_][A-Za-z0-9_]*)\})")
_SUFFIXES: Final = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}

_RULES: Final = core.Rules(line_bytes_max=1 << 20, series_max=1_000_000, renames=())
"""What is read was read before, and is within the limits."""

Labels = dict[str, str]


class RuleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule, as it is written."""

    action: Action = "replace"
    source_labels: tuple[str, ...] = ()
    separator: str = ";"
    regex: str = "(.*)"
    target_label: str = ""
    replacement: str = "$1"
    modulus: Annotated[int, Meta(ge=0)] = 0


class Protected:
    """Labels that may be read and not changed.

    Args:
        names: Whole names.
        prefixes: Beginnings of names.
    """

    def __init__(self, names: Iterable[str] = (), prefixes: tuple[str, ...] = ()) -> None:
        self._names = frozenset(names)
        self._prefixes = prefixes

    def has(self, name: str) -> bool:
        """Return whether a label is one of them."""
        return name in self._names or name.startswith(self._prefixes)


class Rule:
    """One rule, checked and compiled.

    Args:
        config: As it is written.
        protected: Labels that may not be changed.

    Raises:
        InvalidArgument: It makes no sense.
    """

    def __init__(self, config: RuleConfig, protected: Protected) -> None:
        self._config = config
        self._protected = protected
        action = config.action
        self._regex = compile_whole(config.regex)
        if action in ("replace", "hashmod", "lowercase", "uppercase", "keepequal", "dropequal"):
            self._check_target()
        if action == "hashmod" and config.modulus == 0:
            raise InvalidArgument("modulus", config.modulus, "hashmod wants one above 0")
        if action in ("labeldrop", "labelkeep") and (config.source_labels or config.target_label):
            raise InvalidArgument("rule", action, "takes a regex and nothing else")
        self.is_by_name = action in ("keep", "drop") and config.source_labels == (NAME,)
        """Whether the name of a series alone decides."""

    def _check_target(self) -> None:
        target, action = self._config.target_label, self._config.action
        if not target:
            raise InvalidArgument("target_label", target, f"{action} wants one")
        if action in ("keepequal", "dropequal"):
            return
        if self._protected.has(target):
            raise InvalidArgument("target_label", target, "says whose a series is, and stays", "choose another label")
        if (action != "replace" or "$" not in target) and target != NAME and _LABEL.fullmatch(target) is None:
            raise InvalidArgument("target_label", target, "no label's name")

    @property
    def reads_protected(self) -> bool:
        """Whether the rule may look at a protected label."""
        config = self._config
        return config.action == "labelmap" or any(self._protected.has(name) for name in (config.target_label, *config.source_labels))

    def apply(self, labels: Labels) -> bool:
        """Change labels; return whether the series is kept.

        Args:
            labels: All of the series, `__name__` among them; changed in place.
        """
        config = self._config
        value = config.separator.join(labels.get(name, "") for name in config.source_labels)
        match config.action:
            case "keep":
                return self._regex.fullmatch(value) is not None
            case "drop":
                return self._regex.fullmatch(value) is None
            case "keepequal":
                return labels.get(config.target_label, "") == value
            case "dropequal":
                return labels.get(config.target_label, "") != value
            case "replace":
                self._replace(labels, value)
            case "hashmod":
                digest = hashlib.md5(value.encode(), usedforsecurity=False).digest()
                _put(labels, config.target_label, str(int.from_bytes(digest[8:]) % config.modulus))
            case "lowercase":
                _put(labels, config.target_label, value.lower())
            case "uppercase":
                _put(labels, config.target_label, value.upper())
            case "labelmap":
                self._map(labels)
            case "labeldrop" | "labelkeep":
                wants = config.action == "labelkeep"
                for name in list(labels):
                    if name != NAME and not self._protected.has(name) and (self._regex.fullmatch(name) is not None) != wants:
                        del labels[name]
        return True

    def _replace(self, labels: Labels, value: str) -> None:
        found = self._regex.fullmatch(value)
        if found is None:
            return
        target = _expand(self._config.target_label, found)
        if self._protected.has(target) or (target != NAME and _LABEL.fullmatch(target) is None):
            return
        _put(labels, target, _expand(self._config.replacement, found))

    def _map(self, labels: Labels) -> None:
        for name, value in list(labels.items()):
            found = None if name == NAME else self._regex.fullmatch(name)
            if found is None:
                continue
            target = _expand(self._config.replacement, found)
            if not self._protected.has(target) and target != NAME and _LABEL.fullmatch(target) is not None:
                _put(labels, target, value)


class Relabeler:
    """A list of rules over the families of a sandbox.

    Args:
        configs: The rules, in order.
        protected: Labels that may be read and not changed.

    Raises:
        InvalidArgument: A rule makes no sense; the message says which.
    """

    def __init__(self, configs: Sequence[RuleConfig], protected: Protected) -> None:
        if len(configs) > RULES_MAX:
            raise InvalidArgument("relabelling rules", len(configs), f"at most {RULES_MAX}")
        self._protected = protected
        self._rules = []
        for number, config in enumerate(configs, start=1):
            try:
                self._rules.append(Rule(config, protected))
            except InvalidArgument as error:
                raise InvalidArgument("relabelling rule", number, error.message, error.hint) from None
        self._is_by_name = all(rule.is_by_name for rule in self._rules)
        self._names: dict[str, bool] = {}
        self._is_shared = not any(rule.reads_protected for rule in self._rules)
        """Whether what the rules decide is the same for all sandboxes."""
        self._heads: dict[tuple[str, str, str], tuple[str, str] | None] = {}
        """By a series' name and labels: its new name and labels, None if it goes."""

    def __len__(self) -> int:
        return len(self._rules)

    def apply(self, families: Families) -> tuple[Families, int]:
        """Return what the rules leave of a sandbox's families, and how many series they took out."""
        if not self._rules:
            return families, 0
        n_before = sum(fragment.n_series for fragment in families.values())
        shown = self._whole_families(families) if self._is_by_name else None
        if shown is None:
            text = "".join(self._family(name, fragment) for name, fragment in families.items())
            # Names may have changed, and series become equal: the reader puts that in order, as it does with anything.
            shown = core.read(text.encode(), (), _RULES, {}).families
        return shown, n_before - sum(fragment.n_series for fragment in shown.values())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _whole_families(self, families: Families) -> Families | None:
        """Return the families that stay, None if the rules want a part of one: the quick way, by names."""
        shown: Families = {}
        for name, fragment in families.items():
            keeps = self._keeps(name)
            if any(self._keeps(name + suffix) != keeps for suffix in _SUFFIXES.get(fragment.kind, ())):
                return None
            if keeps:
                shown[name] = fragment
        return shown

    def _keeps(self, name: str) -> bool:
        known = self._names.get(name)
        if known is None:
            if len(self._names) >= KNOWN_MAX:
                self._names.clear()
            labels = {NAME: name}
            known = self._names[name] = all(rule.apply(labels) for rule in self._rules)
        return known

    def _family(self, name: str, fragment: Fragment) -> str:
        """Return what the rules leave of a family, as an exposition."""
        lines = [f"# HELP {name} {fragment.help.decode()}\n# TYPE {name} {fragment.kind}\n"]
        for line in fragment.text.decode()[:-1].split("\n"):  # a label's value may have other ends of lines in it
            head = _HEAD.match(line)
            assert head is not None, "the reader writes no other lines"
            pairs = _PAIR.findall(head.group(2) or "")
            fixed = ",".join([f'{key}="{value}"' for key, value in pairs if self._protected.has(key)])
            own = ",".join([f'{key}="{value}"' for key, value in pairs if not self._protected.has(key)])
            known = (head.group(1), own, "" if self._is_shared else fixed)
            if known not in self._heads:
                if len(self._heads) >= KNOWN_MAX:
                    self._heads.clear()
                self._heads[known] = self._decide(head.group(1), pairs)
            decided = self._heads[known]
            if decided is not None:
                labels = ",".join([part for part in (fixed, decided[1]) if part])
                lines.append(f"{decided[0]}{{{labels}}} {line[head.end() :]}\n")
        return "".join(lines)

    def _decide(self, name: str, pairs: list[tuple[str, str]]) -> tuple[str, str] | None:
        """Return a series' new name and its labels that are not protected, None if it goes."""
        labels = {NAME: name}
        for key, value in pairs:
            labels[key] = _ESCAPE.sub(_unescape, value)
        if not all(rule.apply(labels) for rule in self._rules):
            return None
        name = labels.get(NAME, "")
        if _NAME.fullmatch(name) is None:
            return None
        own = [f'{key}="{escaped(value)}"' for key, value in labels.items() if self._is_own(key) and value]
        return name, ",".join(own)

    def _is_own(self, name: str) -> bool:
        return not name.startswith("__") and not self._protected.has(name)


def _put(labels: Labels, name: str, value: str) -> None:
    """Set a label; an empty value is no label."""
    if value:
        labels[name] = value
    else:
        labels.pop(name, None)


def _unescape(found: "re.Match[str]") -> str:
    return "\n" if found.group(1) == "n" else found.group(1)


def _expand(template: str, found: "re.Match[str]") -> str:
    """Return a template with the groups of a match in place of $1, ${1} and ${name}; what is no group of it is nothing, as in Go."""

    def value(reference: "re.Match[str]") -> str:
        if reference.group() == "$$":
            return "$"
        name = reference.group(1) or reference.group(2)
        try:
            return found.group(int(name) if name.isdigit() else name) or ""
        except (IndexError, KeyError, re.error):
            return ""

    return _REFERENCE.sub(value, template)
