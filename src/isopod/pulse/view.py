"""View: what one scrape shows: references to the families of a moment, and which of them are wanted.

A view holds no text of its own and is never changed. It is made for a thousand sandboxes in less than a millisecond, since it asks no
sandbox which families it has: the store counts that as rounds come. What stands in a family is looked up when its turn comes.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Final

from isopod.pulse.merge import Block, Counts, Group, Plan, Told, block_of, groups, plan
from isopod.pulse.model import Query
from isopod.pulse.selectors import Selection, select

KEPT_S: Final = 900.0
"""How long after somebody asked for a coding new figures are coded as they come."""


class Demand:
    """Which codings were asked for lately: new rounds are coded at once for these, and for no others.

    Args:
        now: A clock in seconds that never goes back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._asked_s: dict[str, float] = {}

    def note(self, coding: str) -> None:
        """Somebody asked for a coding."""
        self._asked_s[coding] = self._now()

    def is_wanted(self, coding: str) -> bool:
        """Return whether somebody asked for it lately."""
        asked_s = self._asked_s.get(coding)
        return asked_s is not None and self._now() - asked_s < KEPT_S


class View:
    """What one scrape shows: it stays as it was when it was made, whatever happens to the store. Made by `Store.view`.

    Args:
        blocks: The families, the agent's own first.
        chosen: Which of them are shown, and of which kind.
        selection: Which of their series are wanted, None for all.
        n_sandboxes: How many sandboxes are in it.
        generation: The store's when it was made.
        tag: Equal for two views of the same store that show the same, the agent's own families aside.
        demand: Told what it is rendered to.
    """

    __slots__ = ("blocks", "chosen", "demand", "generation", "n_sandboxes", "selection", "tag")

    def __init__(
        self,
        blocks: Sequence[Block],
        chosen: Plan,
        *,
        selection: Selection | None,
        n_sandboxes: int,
        generation: int,
        tag: Hashable,
        demand: Demand,
    ) -> None:
        self.blocks = blocks
        self.chosen = chosen
        self.selection = selection
        self.n_sandboxes = n_sandboxes
        self.generation = generation
        self.tag = tag
        self.demand = demand

    @property
    def conflicts(self) -> Mapping[str, int]:
        """By family, how many sandboxes' fragments are left out."""
        return self.chosen.conflicts

    def groups(self) -> Iterator[Group | None]:
        """Iterate over its families in the order of their names; None now and then says that much time went by without one."""
        if self.selection is None:
            return groups(self.chosen, self.blocks)
        return select(self.selection, self.chosen, self.blocks)


def make_view(
    query: Query,
    own: Told,
    *,
    blocks: Sequence[Block],
    censuses: Sequence[Counts],
    n_sandboxes: int,
    generation: int,
    tag: Hashable,
    demand: Demand,
) -> View:
    """Return a view.

    Args:
        query: What is wanted; its sandboxes were chosen already.
        own: The agent's own families.
        blocks: The families of sandboxes.
        censuses: How many have which.
        n_sandboxes: How many there are.
        generation: The store's.
        tag: What is in it.
        demand: Told what it is rendered to.

    Raises:
        InvalidArgument: A selector is malformed.
    """
    selection = Selection.parse(query.matches) if query.matches else None
    chosen = plan(censuses, own.kinds)
    kinds = chosen.kinds
    conflicts = chosen.conflicts
    if query.prefixes:
        kinds = {name: kind for name, kind in kinds.items() if name.startswith(query.prefixes)}
        conflicts = {name: n for name, n in conflicts.items() if name.startswith(query.prefixes)}
    if query.names:
        kinds = {name: kinds[name] for name in query.names if name in kinds}
        conflicts = {name: n for name, n in conflicts.items() if name in query.names}
    if selection is not None:
        kinds = {name: kind for name, kind in kinds.items() if selection.wants_family(name, kind)}
    return View(
        [*([block_of(own.families, is_kept=False)] if own.families else ()), *own.blocks, *blocks],
        Plan(kinds, conflicts),
        selection=selection,
        n_sandboxes=n_sandboxes,
        generation=generation,
        tag=(query, tag),
        demand=demand,
    )
