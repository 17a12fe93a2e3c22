"""Records of fronts whose shape is known."""

import numpy as np

import rsoups

GRID = [1.0, 0.75, 0.5, 0.25, 0.0]


def record(name, lambdas, prompt, **rewards):
    method = None if lambdas is None else "exact"
    return {
        "name": name,
        "lambdas": lambdas,
        "method": method,
        "prompt": prompt,
        "response": "text",
        "rewards": rewards,
        "seed": 0,
    }


def records(n=400, bulge=0.0, noise=1.0):
    """Soups from (1, 0) to (0, 1), `bulge`·4λ(1-λ) above the chord, with one noise per prompt that all share."""
    shared = np.random.default_rng(1).normal(size=n) * noise
    out = []
    for i in range(n):
        out.append(record("base", None, f"prompt {i}", a=shared[i], b=shared[i]))
        out.append(record("MORL", None, f"prompt {i}", a=0.5 + shared[i], b=0.5 + shared[i]))
        for x in GRID:
            above = bulge * 4 * x * (1 - x)
            rewards = {"a": x + above + shared[i], "b": 1 - x + above + shared[i]}
            out.append(record("soup", {"A": x, "B": 1 - x}, f"prompt {i}", **rewards))
    return out, shared


def noisy(n=60, seed=0, start=0):
    """Records whose noise differs from model to model, so that choices are uncertain; prompts from `start` on."""
    random, out = np.random.default_rng(seed), []
    for i in range(start, start + n):
        for name, at in (("base", (0.2, 0.2)), ("MORL 0.5/0.5", (0.6, 0.6)), ("MORL 0.2/0.8", (0.3, 0.85))):
            a, b = at + random.normal(size=2)
            out.append(record(name, None, f"prompt {i}", a=a, b=b))
        for x in GRID:
            a, b = np.array([x, 1 - x]) + x * (1 - x) + random.normal(size=2)
            out.append(record("soup", {"A": x, "B": 1 - x}, f"prompt {i}", a=a, b=b))
    return out


def resampled(front, points, seed=0):
    """Means of points in each bootstrap draw, one draw after the other: what the library does by a product of matrices."""
    n = len(front.prompts)
    for draw in np.random.default_rng(seed).integers(0, n, size=(2000, n)):
        yield np.array([point.values[draw].mean(axis=0) for point in points])


def above(gains, n=400, noise=0.1):
    """A base at 0, and soups with these gains of a and b over it; each with a noise of its own."""
    random, rows = np.random.default_rng(3), []
    for i in range(n):
        for place, gain in enumerate([(0.0, 0.0), *gains]):
            a, b = gain + random.normal(size=2) * noise
            x = (place - 1) / (len(gains) - 1)
            rows.append(
                record("soup", {"A": 1 - x, "B": x}, f"p{i}", a=a, b=b)
                if place
                else record("base", None, f"p{i}", a=a, b=b)
            )
    return rows


PUBLISHED = "name,lambda_A,lambda_B,a,b,a_low,a_high\n,1,0,1,0,.9,1.1\n,.5,.5,.7,.7,,\n,0,1,0,1,,\nMORL,,,.6,.6,,\n"


def three_rewards(n=4):
    """Soups of three ingredients on a grid, the base, MORL, with everything that a sweep may tell of a response."""
    rows = []
    for i in range(n):
        told = {"response": "two words", "tokens": 5 + i, "kl": 1.0 + i, "base_nll": 12.0 + i}
        for a, b, c in rsoups.simplex(3, 5):
            rows.append(record("soup", {"A": a, "B": b, "C": c}, f"p{i}", a=a + i, b=b - i, c=c * i) | told)
        for name in ("base", "MORL", "MORL <2>"):
            rows.append(record(name, None, f"p{i}", a=0.1 * i, b=-0.3, c=0.2) | told)
    return rows


def staircase(points, at):
    """The area that points of two rewards dominate above a reference."""
    area, height = 0.0, at[1]
    for x, y in sorted(np.asarray(points).tolist(), reverse=True):
        if x > at[0] and y > height:
            area, height = area + (x - at[0]) * (y - height), y
    return area
