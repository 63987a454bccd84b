"""Places for the labels of a scatter plot: beside their points, where nothing else is."""

from __future__ import annotations

import numpy as np

_NEAR = 8.0  # distance of a label's centre from its point, in points, where nothing is in the way
_DISTANCES = (_NEAR, 10.0, 12.5, 16.0, 20.0, 25.0, 31.0, 38.0, 46.0)
_ANGLES = 24
_SWEEPS = 4  # how often every label may move while the others stay


def spread(
    points: np.ndarray, sizes: np.ndarray, box: np.ndarray, reach: np.ndarray, lines: np.ndarray
) -> np.ndarray:
    """Centres [n, 2] of labels beside their points.

    Each label in turn takes the best of a few places around its point: free of points, other labels
    and their leaders, better not on a line, and near.

    Args:
        points: [n, 2]; all lengths in one unit, printer's points.
        sizes: [n, 2], widths and heights of the labels.
        box: ((left, bottom), (right, top)) that labels stay inside.
        reach: [n], half the width of each point's marker.
        lines: [m, 2, 2], ends of upright and level lines in the plot.
    """
    turns = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
    around = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    offsets = np.concatenate([distance * around for distance in _DISTANCES])
    centres = np.full_like(points, np.inf, dtype=float)
    middles, halves = lines.mean(axis=1), np.abs(lines[:, 1] - lines[:, 0]) / 2 + 0.5
    markers = np.stack([reach, reach], axis=1)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2)
    crowded = np.argsort(-(gaps < 3 * _NEAR).sum(axis=1), kind="stable")
    for _ in range(_SWEEPS):
        for i in crowded:
            others = np.arange(len(points)) != i
            places = points[i] + offsets
            cost = 0.4 * (np.linalg.norm(offsets, axis=1) - _NEAR)
            half = sizes[i] / 2
            outside = (places - half < box[0]) | (places + half > box[1])
            cost = cost + 1e6 * outside.any(axis=1)
            cost += 3 * _shared(places, half, points, markers).sum(axis=1)
            cost += 0.6 * _shared(places, half, middles, halves).sum(axis=1)
            labels = _shared(places, half, centres[others], sizes[others] / 2)
            cost += 5 * labels.sum(axis=1)
            cost += 12 * _passed(points[i], places, points[others], 4.0).sum(axis=1)
            cost += 12 * _passed(points[i], places, centres[others], sizes.min() / 2).sum(axis=1)
            centres[i] = places[np.argmin(cost)]
    return centres


def leads(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """For each label, whether it is so far from its point that a line should join them."""
    return np.linalg.norm(centres - points, axis=1) > 1.5 * _NEAR


def _shared(
    centres: np.ndarray, reach: np.ndarray, others: np.ndarray, reaches: np.ndarray
) -> np.ndarray:
    """Area [n, m] that boxes around `centres` share with boxes around `others`."""
    apart = np.abs(centres[:, None] - others[None])
    return np.clip(reach + reaches[None] - apart, 0, None).prod(axis=2)


def _passed(start: np.ndarray, ends: np.ndarray, others: np.ndarray, near: float) -> np.ndarray:
    """[n, m]: whether a line from `start` to each end passes by one of `others`."""
    others = np.where(np.isfinite(others), others, 1e9)  # labels without a place yet are nowhere
    along = ends - start
    share = ((others[None] - start) * along[:, None]).sum(axis=2) / (along**2).sum(axis=1)[:, None]
    nearest = start + np.clip(share, 0, 1)[..., None] * along[:, None]
    return np.linalg.norm(nearest - others[None], axis=2) < near
