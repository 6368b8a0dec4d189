"""Rows of the key-value cache: who holds which, which tokens lie there, and the order that a step wants."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slot:
    """One row. `tokens`: the head of what it holds that others may reuse, also after its stream has ended.

    Only what was computed as a prompt: a single token, decoded or a prompt of its own, takes other kernels, and a
    stream that reused it would not get bit for bit what it gets alone (see `runner.next_chunk`).
    """

    taken: bool = False
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    used: int = 0  # when it was last let go, in ends of streams


def shared_head(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def longest_head(slots: Sequence[Slot], adapter: str | None, prompt: Sequence[int]) -> tuple[int, int]:
    """The slot that begins with most of `prompt`, and how much: (slot, 0) where none does."""
    wanted = list(prompt)
    heads = [shared_head(slot.tokens, wanted) if slot.adapter == adapter else 0 for slot in slots]
    best = max(range(len(slots)), key=heads.__getitem__)
    return best, heads[best]


def slot_for(slots: Sequence[Slot], adapter: str | None, prompt: Sequence[int]) -> int:
    """A free slot for a new stream; ValueError if there is none.

    One that holds nothing but a head of the prompt, the longest (the turn before this one of a conversation); else an
    empty one; else the one that was let go the longest ago.
    """
    free = [i for i, slot in enumerate(slots) if not slot.taken]

    def preference(i: int) -> tuple[int, bool, int, int]:
        tokens, same = slots[i].tokens, slots[i].adapter == adapter
        continued = len(tokens) if same and tokens == list(prompt[: len(tokens)]) else 0
        return -continued, bool(tokens), slots[i].used, i

    return min(free, key=preference)


def swaps(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Exchanges of two rows, in order, after which rows stand by rank: each one puts at least one row into its place.

    A row that stands within its rank's range stays. Where an exchange can put both rows into place, it does.
    """
    wanted, now, done = sorted(ranks), list(ranks), []
    for i, rank in enumerate(wanted):
        if now[i] == rank:
            continue
        misplaced = [j for j in range(i + 1, len(now)) if now[j] == rank and wanted[j] != rank]
        j = next((j for j in misplaced if wanted[j] == now[i]), misplaced[-1])
        now[i], now[j] = now[j], now[i]
        done.append((i, j))
    return done
