"""``sollol replay``: where the requests of the journal would have gone under other settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agent.ollama import names
from proxy_addon.commands.client import NoAnswer, console, fail, fetch, human_s, print_json
from proxy_addon.entry import Entry, unpack
from proxy_addon.journal import REQUEST, parse, read
from proxy_addon.replay import Again, Other, Replayed, moves, replay, summaries
from proxy_addon.settings import Settings, SettingsError, load
from proxy_addon.settings_sources import from_pairs

#: The settings by which the recorded choices can be made again.
DECIDING = ("placement", "specialise", "specialise_factor")
IN_MEMORY = 1000  #: requests that a running proxy tells of
MOVES = 20  #: pairs of nodes that are listed
UNTOLD = (
    "Each choice is made again from what was known then: had requests gone elsewhere, later ones would have"
    " met other queues and other models in memory."
)
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Mistake(Exception):
    """What was asked cannot be done; the message is one sentence."""


def replay_command(
    since: Annotated[
        str, typer.Option(metavar="TIME", help="From when on: 30m, 1h, 2d ago, or 2026-08-01T12:00.")
    ] = "1h",
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Until when.", show_default="now")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What to change: placement=score; see placement.md."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Only requests for it.")] = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Only its requests.")] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="How many changed ones are listed.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it for a script.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings that name the state directory.", envvar="SOLLOL_CONFIG"),
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the proxy remembers.")] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Ask a running proxy, which has the last 1000 in memory."),
    ] = None,
) -> None:
    """Place the requests of the last hour again, under other settings, and say what would have changed."""
    try:
        other, settings = _other(sets or (), config, state_dir)
        now = datetime.now(UTC)
        first, last = moment("--since", since, now), moment("--until", until, now) if until else now
        if first >= last:
            raise Mistake(f"--since {since} is not before {f'--until {until}' if until else 'now'}")
        key = _canonical(model) if model is not None else None
    except (Mistake, SettingsError) as exc:
        fail("replay", exc, 2)
    try:
        found = _asked(url) if url else _read(settings.state_dir / "journal")
        wanted = (
            entry
            for entry in found
            if (at := _at(entry)) is not None
            and first <= at <= last
            and (key is None or _is_for(entry, key))
            and client in (None, entry.get("client"))
        )
        done = replay(wanted, other)
        if not done.again:
            raise NoAnswer(_nothing(done, url or str(settings.state_dir / "journal")))
    except NoAnswer as exc:
        fail("replay", exc)
    if as_json:
        print_json(_as_json(done))
    else:
        console().print(render(done, sets or (), limit))


def moment(option: str, text: str, now: datetime) -> datetime:
    """When ``text`` is: so long before ``now`` (``1h``), or a time of this machine's clock in ISO's form.

    Raises Mistake for anything else.
    """
    if ago := _AGO.fullmatch(text.strip()):
        try:
            return now - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        except OverflowError:
            raise Mistake(f"{option} {text} is before all time") from None
    try:
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Mistake(
            f"{option} should be 30m, 1h, 2d or a time such as 2026-08-01T12:00, not {text!r}"
        ) from None


def _other(sets: Sequence[str], config: Path | None, state_dir: Path | None) -> tuple[Other, Settings]:
    """What ``sets`` change, and the settings as the proxy would read them.

    Raises SettingsError, and Mistake where one of ``sets`` has no influence on a choice.
    """
    flags = {"--state-dir": str(state_dir)} if state_dir else None
    settings = load(config, os.environ, sets, flags)
    changed = from_pairs(sets).values
    for name in changed:
        if name not in DECIDING:
            deciding = ", ".join(DECIDING)
            raise Mistake(
                f"{name} has no influence on a choice among the recorded candidates; {deciding} have"
            )
    return (
        Other(
            settings.placement if "placement" in changed else None,
            {
                kind: nodes
                for kind, nodes in settings.specialise.items()
                if kind in changed.get("specialise", {})
            },
            settings.specialise_factor if "specialise_factor" in changed else None,
            settings.admission.ahead_s,
        ),
        settings,
    )


def _canonical(model: str) -> str:
    try:
        return names.canonical(model)
    except ValueError as exc:
        raise Mistake(f"--model: {exc}") from None


def _is_for(entry: Entry, key: str) -> bool:
    try:
        return names.canonical(str(entry.get("model"))) == key
    except ValueError:
        return False


def _at(entry: Entry) -> datetime | None:
    try:
        return datetime.fromisoformat(str(entry.get("at"))).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _read(directory: Path) -> Iterator[Entry]:
    """The requests on disk, the oldest first."""
    if not directory.is_dir():
        raise NoAnswer(
            f"there is no journal in {directory}: name the proxy's --state-dir, or ask it with --url"
        )
    try:
        for columns, line in read(directory):
            made = parse(line) if line.startswith(REQUEST) else None
            if made is not None and isinstance(made.get("decisions"), list):
                try:
                    yield unpack(made, columns)
                except ValueError:
                    yield made  # which replay passes over and counts
    except OSError as exc:
        raise NoAnswer(f"the journal in {directory} cannot be read: {exc.strerror}") from exc


def _asked(url: str) -> list[Entry]:
    """The requests that a running proxy has in memory, the oldest first."""
    answer = fetch(url, f"/sollol/decisions?limit={IN_MEMORY}")
    found = answer.get("requests") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise NoAnswer(f"the proxy at {url} is of another version: it tells of no requests")
    return [entry for entry in reversed(found) if isinstance(entry, dict) and "decisions" in entry]


def _nothing(done: Replayed, where: str) -> str:
    if done.bare:
        return f"no decision in {where} says what it was made of: an earlier version wrote all {done.bare}"
    return (
        f"no such request was placed, says {where}: --since and --until say when, --state-dir and --url where"
    )


def render(done: Replayed, sets: Sequence[str], limit: int) -> RenderableType:
    """What would have changed, for people."""
    total, *by_model = summaries(done.again)
    under = " and ".join(sets) if sets else "the settings of the time"
    first, last = done.again[0].at, done.again[-1].at
    head = Text.assemble(
        (f"{total.moved} of {total.placed} choices", "bold"),
        f" would have been others under {under} ({done.requests} requests, {first} to {last})",
    )
    rows = [total, *by_model] if len(by_model) > 1 else by_model
    table = _table(
        ("MODEL", "PLACED", "ELSEWHERE", "MEAN BEFORE", "AFTER", "P99 BEFORE", "AFTER"),
        [
            (
                *(row.model or "all", f"{row.placed}", f"{row.moved}"),
                *(human_s(row.mean_before_s), human_s(row.mean_after_s)),
                *(human_s(row.p99_before_s), human_s(row.p99_after_s)),
            )
            for row in rows
        ],
        left=1,
    )
    return Group(head, table, *_changes(done, limit), *_remarks(done), Text(UNTOLD, "dim"))


def _changes(done: Replayed, limit: int) -> Iterator[RenderableType]:
    """From where to where, then one by one, the newest first."""
    moved = [each for each in reversed(done.again) if each.moved]
    if not moved:
        return
    pairs = moves(moved)
    yield Text()
    yield _table(("FROM", "TO", "TIMES"), [(a, b, f"{count}") for a, b, count in pairs[:MOVES]], left=2)
    if len(pairs) > MOVES:
        yield Text(f"and {len(pairs) - MOVES} more pairs", "dim")
    if limit == 0:
        return
    yield Text()
    titles = ("ID", "AT", "MODEL", "FROM", "TO", "EXPECTED BEFORE", "AFTER")
    yield _table(titles, [_change(each) for each in moved[:limit]], left=5)
    if len(moved) > limit:
        yield Text(f"and {len(moved) - limit} more", "dim")


def _change(each: Again) -> tuple[str, ...]:
    return (
        *(each.id, each.at, each.model, each.before, each.after),
        *(human_s(each.before_s), human_s(each.after_s)),
    )


def _remarks(done: Replayed) -> Iterator[Text]:
    yield Text()
    if done.bare:
        yield Text(
            f"Passed over: {done.bare} decisions of which the journal does not say what they were made of."
        )
    if done.partial:
        yield Text(
            f"In {done.partial} of them more nodes could have served than the journal has: they may have won."
        )
    yield Text("Seconds are what finish_time expected of a request: wait, load, prefill, decode.", "dim")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _as_json(done: Replayed) -> Mapping[str, Any]:
    return {
        "requests": done.requests,
        "passed_over": done.bare,
        "partial": done.partial,
        "summaries": [asdict(row) for row in summaries(done.again)],
        "moves": [{"from": a, "to": b, "times": count} for a, b, count in moves(done.again)],
        "changed": [asdict(each) for each in done.again if each.moved],
    }
