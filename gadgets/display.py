"""Progress display for a user at a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from .failure import one_line

BARS = ("sweep", "error map")  # stages that report how far they have got
COUNT = re.compile(rf"({'|'.join(BARS)}) (\d+)/(\d+)")


class Display:
    """Progress on stderr: one live line on a terminal, plain lines elsewhere; also collects facts and stage times."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True, markup=False, emoji=False)  # a peer's text may hold brackets
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, int] = {}
        self.facts: dict = {"warnings": [], "sweeps": 0}
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if not self.bars.disable:  # rich before 14.3 would print an empty line
            self.bars.stop()

    def say(self, text: str) -> None:
        """Show a line; "sweep 3/30" or "error map 3/30" updates its bar instead."""
        text = one_line(text)
        if found := COUNT.fullmatch(text):
            self.count(found[1], int(found[2]), int(found[3]))
        else:
            self.bars.console.print(text, style="dim", highlight=False)

    def count(self, name: str, done: int, total: int) -> None:
        """Update the bar `name`."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self.tasks[name], completed=done)

    def stage(self, stage: str, facts: dict) -> None:
        """Handle a report from the reconstruction."""
        now = time.monotonic()
        name = "sweeps" if stage == "sweep" else stage
        self.seconds[name] = round(self.seconds.get(name, 0) + now - self.last, 3)
        self.last = now
        if stage in BARS:
            self.facts["sweeps"] = facts["sweep"] if stage == "sweep" else self.facts["sweeps"]
            self.count(stage, facts["sweep"], facts["sweeps"])
        self.note(facts.get("warnings", []))
        self.facts.update({k: v for k, v in facts.items() if k not in ("sweep", "sweeps", "warnings")})

    def note(self, notes: Iterable[str]) -> None:
        """Add notes for the user, on any volume, to `facts`; each sentence only once."""
        self.facts["warnings"] = list(dict.fromkeys([*self.facts["warnings"], *map(one_line, notes)]))
