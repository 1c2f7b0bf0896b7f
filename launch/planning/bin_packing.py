"""Packing the samples of a step into groups: best-fit decreasing, and the largest first to the lightest (LPT).

Pure functions in whole numbers, as `launch.planning.load_balance` which uses them. Our own because the packers of trl
and datasets pack a whole data set into rows, not the samples of one step into a given number of groups.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Groups = list[list[int]]  # samples by their place in the step, ascending; one list per micro-batch (or rank)


def members_of(group_of: list[int], count: int) -> Groups:
    """List the members of each group, ascending."""
    groups: Groups = [[] for _ in range(count)]
    for index, group in enumerate(group_of):
        groups[group].append(index)
    return groups


def balance(weights: Sequence[int], count: int, most: int | None = None) -> list[int]:
    """Assign a group to each weight: heaviest first, to the lightest group, at most `most` to each (LPT)."""
    group_of = [0] * len(weights)
    heap = [(0, 0, group) for group in range(count)]
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, held, group = heap[0]
        group_of[index] = group
        if held + 1 == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + weights[index], held + 1, group))
    return group_of


def pack_into(lengths: Sequence[int], members: Sequence[int], budget: int, count: int) -> Groups | None:
    """`members` in `count` groups of at most `budget` tokens, as even as they come; None: they do not fit."""
    group_of = balance([lengths[i] for i in members], count)
    groups: Groups = [[] for _ in range(count)]
    for member, group in zip(members, group_of, strict=True):
        groups[group].append(member)
    if any(total(group, lengths) > budget for group in groups):
        groups = best_fit_decreasing(lengths, members, budget)
        if len(groups) > count:
            return None
        groups = fill_empty(groups + [[] for _ in range(count - len(groups))], lengths)
    return largest_first(groups, lengths)


def fill_empty(groups: Groups, lengths: Sequence[int]) -> Groups:
    """Halve the group of most tokens for each empty one, as long as some group has two samples to share."""
    filled = [list(group) for group in groups]
    for empty in [group for group in filled if not group]:
        whole = max(filled, key=lambda group: (len(group) > 1, total(group, lengths)))
        halves = members_of(balance([lengths[i] for i in whole], 2), 2)
        if not halves[1]:
            break
        empty[:], whole[:] = [whole[i] for i in halves[1]], [whole[i] for i in halves[0]]
    return filled


def total(group: Sequence[int], weights: Sequence[int]) -> int:
    """Add up the weights of a group's members."""
    return sum(weights[i] for i in group)


def largest_first(groups: Groups, lengths: Sequence[int]) -> Groups:
    """Sort groups by tokens, descending: ranks run their large micro-batches side by side, and memory peaks at once."""
    return sorted(groups, key=lambda group: -total(group, lengths))


def best_fit_decreasing(lengths: Sequence[int], members: Sequence[int], budget: int) -> Groups:
    """Each sample, longest first, into the fullest group with room for it; a new group when none has."""
    groups: Groups = []
    rooms: list[tuple[int, int]] = []  # (room, group), ascending
    for index in sorted(members, key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            groups.append([index])
            insort(rooms, (budget - length, len(groups) - 1))
        else:
            room, into = rooms.pop(at)
            groups[into].append(index)
            insort(rooms, (room - length, into))
    return groups
