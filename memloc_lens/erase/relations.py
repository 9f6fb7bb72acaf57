"""How other sequences are related to those that are erased, and which subjects they have."""

from collections.abc import Sequence

from memloc_lens.sequence import MemorizedSequence

RELATIONS = ("near-duplicates", "related", "unrelated")
"""The relations, from the closest on."""

Groups = dict[str, list[MemorizedSequence]]
"""Sequences by the name of their group; no group is empty."""


def by_relation(targets: Sequence[MemorizedSequence], others: Sequence[MemorizedSequence]) -> Groups:
    """Return other sequences by what they have to do with the targets; each is in one group.

    Near-duplicates share 5-grams of tokens with a target, directly or through others (`near_duplicate_groups`); related
    ones share a category with one.

    Args:
        targets: that are erased.
        others: that should stay.

    Example:
        >>> others = load_sequences(model)[1:7]
        >>> {name: len(group) for name, group in by_relation([sequence], others).items()}
        {'related': 1, 'unrelated': 5}
    """
    from memloc_lens.data.near_duplicates import near_duplicate_groups

    rows = near_duplicate_groups([each.tokens.tolist() for each in (*targets, *others)])
    of_targets = set(rows[: len(targets)].tolist())
    subjects = {subject for target in targets for subject in target.category}
    groups: Groups = {name: [] for name in RELATIONS}
    for other, row in zip(others, rows[len(targets) :].tolist(), strict=True):
        related = "related" if subjects & set(other.category) else "unrelated"
        groups["near-duplicates" if row in of_targets else related].append(other)
    return {name: group for name, group in groups.items() if group}


def by_category(others: Sequence[MemorizedSequence]) -> Groups:
    """Return sequences by category; one of several categories is in several groups.

    Example:
        >>> texts = [MemorizedSequence([1, 2], 1, category=subjects) for subjects in (["one", "two"], "two")]
        >>> {name: len(group) for name, group in by_category(texts).items()}
        {'one': 1, 'two': 2}
    """
    groups: Groups = {}
    for other in others:
        for category in dict.fromkeys(other.category):
            groups.setdefault(category, []).append(other)
    return groups
