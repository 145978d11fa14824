"""Run notebooks 01 to 08 with a file of parameters; what is done is skipped."""

import argparse
import sys
import time

from helpers.run import notebooks
from helpers.run.parameters import load_parameters


def main() -> None:
    parser = argparse.ArgumentParser("python -m helpers.run", description=__doc__)
    parser.add_argument("parameters", help="a file in notebooks/parameters, or a path to one")
    parser.add_argument("--publish", action="store_true", help="renew the committed notebooks")
    given = parser.parse_args()
    start = time.perf_counter()
    try:
        copies = notebooks.execute(given.parameters, companions=given.publish)
        if given.publish:
            notebooks.publish(copies)
            notebooks.publish_results(load_parameters(given.parameters)["run"])
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - start
    print(f"finished in {seconds:.0f} s; executed notebooks are in {copies[0].parent}")


if __name__ == "__main__":
    main()
