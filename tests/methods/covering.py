"""Tables of options in which every two values of different options meet, though not every combination is run."""

import itertools


def covering(options, allowed=lambda row: True):
    """Few rows (dictionaries) that hold every pair of values that any allowed row holds."""
    rows = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    rows = [(row, _pairs(row)) for row in rows if allowed(row)]
    missing = set().union(*(pairs for _, pairs in rows))
    chosen = []
    while missing:
        best, met = max(rows, key=lambda each: len(each[1] & missing))
        missing -= met
        chosen.append(best)
    return chosen


def name_of(row):
    """A test's id."""
    return "-".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
    )


def _pairs(row):
    return set(itertools.combinations(((name, str(value)) for name, value in row.items()), 2))
