# SPDX-License-Identifier: Apache-2.0
"""One frame of ``fairkv top``: from what a server says of itself to lines of a terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

MISSING = "-"
_RATE_SECONDS = 10.0
_EIGHTHS = "▏▎▍▌▋▊▉"


@dataclass
class View:
    """What is known of a server: its last answer, how fast it works, what is wrong.

    Attributes:
        url: Where it is asked.
        replica: Which data-parallel replica is shown.
        info: ``/server_info``, empty until it first answered.
        state: The ``fairkv`` part of it.
        error: Why there is nothing newer; None if the last question was answered.
        seen: ``time.monotonic()`` of the last answer.
    """

    url: str
    replica: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seen: float | None = None
    _prompts: deque[tuple[float, float]] = field(default_factory=deque)

    def answered(self, info: dict[str, Any], state: dict[str, Any], now: float) -> None:
        """Takes an answer given at ``now`` (``time.monotonic()``, seconds)."""
        self.info, self.state, self.error, self.seen = info, state, None, now
        prompts = number(state.get("compactions"))
        if prompts is None or (self._prompts and prompts < self._prompts[-1][1]):
            self._prompts.clear()  # another server on the same port counts from 0
        if prompts is not None:
            self._prompts.append((now, prompts))
        while len(self._prompts) > 2 and now - self._prompts[1][0] >= _RATE_SECONDS:
            self._prompts.popleft()

    @property
    def prompts_per_second(self) -> float | None:
        """Prompts compressed per second, over the last ten seconds or so; None if not known."""
        if len(self._prompts) < 2:
            return None
        (start, before), (end, after) = self._prompts[0], self._prompts[-1]
        return (after - before) / (end - start) if end > start else None


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None: an older server may lack any field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def frame(view: View, width: int, height: int, blocks: bool = True) -> Text:
    """The frame as lines of at most ``width`` cells, at most ``height`` of them.

    ``blocks``: bars of block characters; else of ``#``, for terminals without Unicode.
    """
    lines = [*_head(view), Text()]
    if view.error is not None:
        lines.append(_error(view))
    ranks = _ranks(view.state)
    if ranks:
        lines.append(_rank_title(width))
        loads = [rank["load"] for rank in ranks if rank["load"] is not None]
        room = max(height - len(lines), 1)
        shown = ranks if len(ranks) <= room else ranks[: max(room - 1, 1)]
        lines += [_rank_line(rank, loads, width, blocks) for rank in shown]
        if len(shown) < len(ranks):
            lines.append(Text(f"     and {len(ranks) - len(shown)} more ranks", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis" if blocks else "crop")
    return Text("\n", no_wrap=True, overflow="crop").join(lines[:height])


def _head(view: View) -> list[Text]:
    state, info = view.state, view.info
    model = _text(info.get("served_model_name") or info.get("model_path"))
    clock = time.strftime("%H:%M:%S")
    replicas = len(info.get("internal_states") or [])
    which = f"  replica {view.replica} of {replicas}" if replicas > 1 else ""
    plan = [_text(state.get("placement")), f"from {_text(state.get('plan_source'))}"]
    replans = number(state.get("replans"))
    agree = state.get("decisions_agree")
    pages = [_ranks_sum(state, key) for key in ("pages_charged", "pages")]
    used = None if None in pages or not pages[1] else pages[0] / pages[1]  # type: ignore[operator]
    rate = view.prompts_per_second
    lines = [
        _line(("fairkv top ", "bold"), (clock, "dim"), f"  {view.url}  {model}{which}"),
        _line(
            ("budget   ", "dim"),
            f"{_text(state.get('budget'))}, {_text(state.get('scorer'))}, scope "
            f"{_text(state.get('scope'))}",
        ),
        _line(
            ("plan     ", "dim"),
            f"{' '.join(plan)}, {_text(state.get('plan_digest'))[:16]}, {_whole(replans)} re-plans",
            (", one under way" if state.get("replan_pending") is True else "", "yellow"),
            ("  RANKS DISAGREE" if agree is False else "", "bold red"),
        ),
        _line(
            ("balance  ", "dim"),
            (f"now {_ratio(state.get('balancedness'))}", "bold"),
            f"  planned {_ratio(state.get('balancedness_planned'))}",
            ("  mean / fullest rank; 1 is perfect", "dim"),
        ),
        _line(
            ("traffic  ", "dim"),
            f"{_whole(_requests(state))} requests, {short(state.get('compactions'))} prompts"
            f", {MISSING if rate is None else f'{rate:.1f}'} prompts/s",
        ),
        _line(
            ("kept     ", "dim"),
            f"{short(state.get('kept_tokens'))} head tokens of "
            f"{short(state.get('prompt_tokens'))} prompt tokens: {_percent(_kept_share(state))}",
        ),
        _line(
            ("pages    ", "dim"),
            f"{_whole(pages[0])} / {_whole(pages[1])} in use: {_percent(used)}",
        ),
    ]
    return lines


def _error(view: View) -> Text:
    ago = "" if view.seen is None else f", last seen {time.monotonic() - view.seen:.0f} s ago"
    return _line((f"{_text(view.error)}; trying again{ago}", "bold red"))


def _rank_title(width: int) -> Text:
    load, pages = _bar_widths(width)
    title = (
        f"rank {'load, tokens per step':<{load + 8}} {'/mean':>6}  {'pages':<{pages + 16}} lanes"
    )
    return Text(title, style="dim")


def _rank_line(rank: dict[str, Any], loads: list[float], width: int, blocks: bool) -> Text:
    load_width, page_width = _bar_widths(width)
    load, top = rank["load"], max(loads, default=0.0)
    mean = sum(loads) / len(loads) if loads else 0.0
    over = load / mean if load is not None and mean > 0 else None
    used, pages = rank["pages_charged"], rank["pages"]
    full = used / pages if used is not None and pages else 0.0
    style = "green" if over is None or over <= 1.05 else "yellow" if over <= 1.2 else "red"
    return _line(
        f"{rank['rank']:>4} ",
        (bar(load / top if load is not None and top > 0 else 0.0, load_width, blocks), style),
        f" {short(load):>7} {MISSING if over is None else f'{over:.2f}':>6}  ",
        (bar(full, page_width, blocks), "cyan" if full < 0.9 else "red"),
        f" {short(used):>7}/{short(pages):<7} {_whole(rank['lanes']):>5}",
    )


def _bar_widths(width: int) -> tuple[int, int]:
    room = max(width - 45, 6)  # what a rank's line has besides its two bars
    pages = max(room // 3, 2)
    return room - pages, pages


def bar(part: float, width: int, blocks: bool = True) -> str:
    """``width`` cells, the ``part`` (0 to 1) of them filled; never empty for more than nothing."""
    cells = min(max(part, 0.0), 1.0) * width
    if not blocks:
        whole = max(round(cells), 1 if part > 0 else 0)
        return "#" * whole + " " * (width - whole)
    eighths = max(round(cells * 8), 1 if part > 0 else 0)
    rest = _EIGHTHS[eighths % 8 - 1] if eighths % 8 else ""
    return ("█" * (eighths // 8) + rest).ljust(width)


def short(value: Any) -> str:
    """A count in at most six characters: 950, 41.0K, 1.23M."""
    count = number(value)
    if count is None:
        return MISSING
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= size:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{count:.0f}"


def _ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Per rank: rank, load, pages_charged, pages, lanes; None where the server does not say."""
    loads = state.get("rank_loads")
    loads = loads if isinstance(loads, list) else []
    ranks = [rank for rank in _list(state, "ranks") if isinstance(rank, dict)]
    out = []
    for index in range(max(len(loads), len(ranks))):
        own = ranks[index] if index < len(ranks) else {}
        fields = {key: number(own.get(key)) for key in ("pages_charged", "pages", "lanes")}
        load = number(loads[index]) if index < len(loads) else None
        name = number(own.get("rank"))
        out.append({"rank": index if name is None else int(name), "load": load, **fields})
    return out


def _list(state: dict[str, Any], name: str) -> list[Any]:
    value = state.get(name)
    return value if isinstance(value, list) else []


def _ranks_sum(state: dict[str, Any], key: str) -> float | None:
    values = [rank[key] for rank in _ranks(state)]
    return sum(values) if values and None not in values else None


def _requests(state: dict[str, Any]) -> float | None:
    counts = [number(r.get("requests")) for r in _list(state, "ranks") if isinstance(r, dict)]
    known = [count for count in counts if count is not None]
    return max(known) if known else None


def _kept_share(state: dict[str, Any]) -> float | None:
    """Part of the prompts' tokens that a head keeps on average."""
    kept, tokens = number(state.get("kept_tokens")), number(state.get("prompt_tokens"))
    per_head = state.get("kept")
    table = per_head.get("tokens") if isinstance(per_head, dict) else None
    if kept is None or not tokens or not isinstance(table, list):
        return None
    heads = sum(len(row) for row in table if isinstance(row, list))
    return kept / (tokens * heads) if heads else None


def _text(value: Any) -> str:
    """A string without what would move a terminal's cursor, or do worse."""
    if not isinstance(value, str) or not value:
        return MISSING
    return "".join(letter if letter.isprintable() else "?" for letter in value)


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def _ratio(value: Any) -> str:
    known = number(value)
    return MISSING if known is None else f"{known:.3f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True)
