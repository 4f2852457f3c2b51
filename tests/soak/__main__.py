"""Kill and resume small runs at random moments for a given time, and count the events.

python -m tests.soak --minutes 60 --json results/soak.json
"""

import argparse
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from random import Random
from time import monotonic

from tqdm import tqdm

import base.openmp  # noqa: F401 - before torch is imported
from base.output import save_json
from base.run_folder.environment import environment
from tests.soak.endurance import Endurance, Tally
from tests.soak.scenarios import SCENARIOS, write_images


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kill and resume small runs at random moments, and count the events."
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random moments and signals"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), metavar="SCENARIO"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    arguments = parser.parse_args()
    tally = Tally()
    begin = monotonic()
    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "images")
        write_images(images)
        random = Random(arguments.seed)
        runs = [
            Endurance(name, Path(place, str(n)), images, random, tally)
            for n, name in enumerate(arguments.only)
        ]
        with tqdm(total=round(arguments.minutes * 60), unit="s", disable=None) as bar:
            for endurance in cycle(runs):
                if monotonic() - begin > arguments.minutes * 60 or tally.failures:
                    break
                endurance.run()
                bar.update(round(monotonic() - begin) - bar.n)
                bar.set_postfix(attempts=tally.counts["attempts"])
    minutes = (monotonic() - begin) / 60
    print("\n".join(f"{count:7,d}  {name}" for name, count in tally.counts.items()))
    for failure in tally.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if arguments.json:
        machine = {
            key: value
            for key, value in environment().items()
            if key in ("python", "packages", "commit", "cpu")
        }
        counts = {
            "minutes": round(minutes, 1),
            "seed": arguments.seed,
            "counts": tally.counts,
            "failures": tally.failures,
        }
        save_json(arguments.json, {**counts, **machine})
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
