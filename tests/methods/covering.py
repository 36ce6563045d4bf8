"""Tables of options in which every two values of different options meet, though not every combination is run."""

import itertools


def covering(options, allowed=lambda row: True):
    """Few rows (dictionaries) that hold every pair of values that any allowed row holds."""
    rows = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    rows = [row for row in rows if allowed(row)]
    missing = set().union(*map(_pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def name_of(row):
    """A test's id."""
    return "-".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
    )


def _pairs(row):
    return set(itertools.combinations(((name, str(value)) for name, value in row.items()), 2))
