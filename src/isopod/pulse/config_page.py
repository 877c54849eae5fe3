"""Config: what /config says: the settings that hold and where each came from, and the policy that holds.

Settings name files with secrets and never hold one, and the page reads no file; of an URL that figures are sent to, what stands behind its
question mark is left out, as everywhere. As text it is YAML.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from textwrap import dedent
from typing import Any, Final

import msgspec

from isopod.net.http.messages import Response
from isopod.pulse.pages import Column, PageKind, as_json, drawn, escaped, page, plain, printable
from isopod.pulse.policy import PolicyState
from isopod.pulse.settings import PulseSettings, shown_url

DEFAULT: Final = "default"
_COLUMNS: Final = (Column("SETTING", "name"), Column("VALUE", "value"), Column("FROM", "origin"))


class SettingRow(msgspec.Struct, frozen=True):
    """A setting. `origin` says who gave it: "flag --view", "variable RUST_LOG", "default", or where in a node's configuration it stands."""

    name: str
    value: Any  # what JSON has: texts, numbers, lists
    origin: str


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True):
    """The policy that holds, and how it stands with its file."""

    file: str
    read_at: str
    """When what holds was read last: 2026-01-02T03:04:05Z."""
    error: str
    """Why what the file says now cannot hold, "" if it does."""
    config: Any  # the file's tables, as they were understood


class ConfigPage(msgspec.Struct, frozen=True):
    """The page as JSON. Without a policy's file there is no policy, and everything is taken."""

    version: str
    settings: list[SettingRow]
    policy: PolicyRow | None


def config_of(version: str, settings: PulseSettings, origins: Mapping[str, str], policy: PolicyState | None) -> ConfigPage:
    """Return what the page says.

    Args:
        version: The agent's.
        settings: Those that hold.
        origins: Who gave them; a setting that is not there is a default.
        policy: The one that holds, None if none was asked for.
    """
    told = msgspec.to_builtins(settings)
    rows = [SettingRow(name, _shown(name, value), origins.get(name, DEFAULT)) for name, value in told.items()]
    return ConfigPage(version, rows, None if policy is None else _policy_row(policy))


def config_page(kind: PageKind, shown: ConfigPage) -> Response:
    """Return the page."""
    if kind == "json":
        return as_json(shown)
    if kind == "text":
        return plain(_text(shown))
    rows = [SettingRow(row.name, _yaml(row.value), row.origin) for row in shown.settings]
    body = f"<h1>Configuration</h1>\n{drawn(_COLUMNS, rows)}<h2>Policy</h2>\n<pre>{_lines(_policy_text(shown.policy))}</pre>\n"
    return page("Configuration", body)


# --- inside ---------------------------------------------------------------------------------------------------------------------------


def _shown(name: str, value: Any) -> Any:
    return shown_url(value) if name == "push_url" else value


def _policy_row(state: PolicyState) -> PolicyRow:
    at = datetime.fromtimestamp(state.read_at_ns // 1_000_000_000, UTC)
    return PolicyRow(file=state.file, read_at=f"{at:%Y-%m-%dT%H:%M:%SZ}", error=state.error, config=msgspec.to_builtins(state.config))


def _text(shown: ConfigPage) -> str:
    settings = "".join(f"  {row.name}: {_yaml(row.value)}  # {printable(row.origin)}\n" for row in shown.settings)
    return f"# isopod pulse {shown.version}\nsettings:\n{settings}policy:{_policy_text(shown.policy)}"


def _policy_text(policy: PolicyRow | None) -> str:
    if policy is None:
        return " null  # no policy file: everything is taken\n"
    lines = "".join(f"  {name}: {_yaml(value)}\n" for name, value in (("file", policy.file), ("read_at", policy.read_at)))
    config = "".join(f"    {line}\n" for line in _block(policy.config).splitlines())
    return f"\n{lines}  error: {_yaml(policy.error)}\n  config:\n{config}"


def _block(value: Any) -> str:
    import yaml  # noqa: PLC0415  only who looks at this page pays for it

    return str(yaml.safe_dump(value, sort_keys=False, width=1 << 30))


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line, whatever is in it."""
    import yaml  # noqa: PLC0415  as above

    if isinstance(value, str):
        return str(yaml.safe_dump(value, default_style='"', width=1 << 30)).rstrip("\n")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return msgspec.json.encode(value).decode()


def _lines(text: str) -> str:
    """Return lines as they may stand in HTML."""
    return "\n".join(map(escaped, dedent(text.strip("\n")).split("\n")))
