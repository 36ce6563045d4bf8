"""Damages every file of a checkpoint in every way, and kills runs at random moments, many times over.

    python benchmarks/soak.py                       # 20 rounds of damage (700 cases), 200 kills
    python benchmarks/soak.py --rounds 1 --kills 0 --seed 3

Each damaged run trains on to its end and is compared, bit for bit, with the one that was whole; so is the killed one.
Ends with an error unless all are equal and none was silent. The same in small runs in tests/faults.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults import accidents


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of damage, of each file in each way")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        accidents.train(whole, 3)
        counts = damage(whole, Path(name) / "damaged", options.rounds, draws)
        print(f"Damage: {dict(counts)}")
        kills = accidents.storm(Path(name) / "killed", options.kills, draws)
        differing = accidents.differences(whole, Path(name) / "killed")
        print(f"Kills: {dict(kills)}; files that differ in the end: {differing or 'none'}")
    sys.exit(bool(differing or counts["silent"] or counts["differing"]))


def damage(whole: Path, folder: Path, rounds: int, draws: random.Random) -> Counter[str]:
    """Return how many damages there were of each outcome, and how many runs "differing" in the end."""
    counts: Counter[str] = Counter()
    shutil.copytree(whole, folder)
    for _ in tqdm(range(rounds), "damage"):
        for _ in accidents.damaged(folder, draws):
            found = accidents.outcome(lambda: accidents.run(folder).fit(resume=True))
            counts[found] += 1
            counts["differing"] += bool(accidents.differences(whole, folder))
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
    return counts


if __name__ == "__main__":
    main()
