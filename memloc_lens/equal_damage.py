"""Curves of what is lost against the damage to all else, to compare methods at equal damage."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Curve = tuple[Float[ndarray, " point"], Float[ndarray, " point"]]
"""Ascending damages from 0 on, and the most that is lost up to each."""


def curve(damages: Sequence[float], lost: Sequence[float]) -> Curve:
    """Return the most that is lost up to each damage.

    Args:
        damages: one a share; negative ones count as 0.
        lost: points lost, one a share.

    Example:
        >>> from memloc_lens.equal_damage import curve
        >>> damage, most = curve([4.0, -1.0, 2.0], [30.0, 5.0, 40.0])
        >>> damage.tolist(), most.tolist()
        ([0.0, 2.0, 4.0], [5.0, 40.0, 40.0])
    """
    clipped, losses = np.maximum(damages, 0.0), np.array(lost)
    damage = np.unique([0.0, *clipped])
    return damage, np.array([max([0.0, *losses[clipped <= at]]) for at in damage])


def area(drawn: Curve, end: float) -> float:
    """Return the mean height of a curve between 0 and a damage: the area under it, over its width.

    Example:
        >>> from memloc_lens.equal_damage import area, curve
        >>> area(curve([2.0], [40.0]), end=4.0)
        30.0
    """
    damage, most = drawn
    inside = damage < end
    heights = np.append(most[inside], np.interp(end, damage, most))
    return float(np.trapezoid(heights, np.append(damage[inside], end)) / end)


def lost_at(points: float, damages: Sequence[float], lost: Sequence[float]) -> float:
    """Return the most that is lost up to a damage, linear between the damages measured.

    Args:
        points: the damage; beyond the largest measured, the value stays.
        damages: one a share; negative ones count as 0.
        lost: points lost, one a share.

    Example:
        >>> from memloc_lens.equal_damage import lost_at
        >>> lost_at(3.0, damages=[1.0, 2.0, 4.0], lost=[10.0, 30.0, 50.0])
        40.0
    """
    return float(np.interp(points, *curve(damages, lost)))
