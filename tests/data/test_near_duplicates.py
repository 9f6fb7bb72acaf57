import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memloc_lens.data.near_duplicates import near_duplicate_groups


def naive_groups(rows, threshold):
    grams = [{tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in rows]
    groups = list(range(len(rows)))
    for one in range(len(rows)):
        for other in range(one):
            union = grams[one] | grams[other]
            if union and len(grams[one] & grams[other]) / len(union) > threshold:
                old, new = groups[one], groups[other]
                groups = [new if group == old else group for group in groups]
    return groups


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=12), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_groups_are_those_of_all_pairs(rows, threshold):
    groups, expected = near_duplicate_groups(rows, threshold), naive_groups(rows, threshold)
    same = np.equal.outer(groups, groups)
    assert (same == np.equal.outer(expected, expected)).all()


def test_joins_reach_through_others():
    chain = [list(range(start, start + 40)) for start in (0, 30, 60)]
    assert near_duplicate_groups(chain, 0.05).tolist() == [0, 0, 0]
    assert len(set(near_duplicate_groups([chain[0], chain[2]], 0.05).tolist())) == 2
