"""Run notebooks 01 to 06 with a file of parameters.

python -m helpers.run demo              # notebooks/parameters/demo.yaml; what is done is skipped
python -m helpers.run demo --publish    # and put the outputs into the committed notebooks
"""

import argparse
import sys
import time

from helpers.run import notebooks
from helpers.run.parameters import load_parameters


def main() -> None:
    parser = argparse.ArgumentParser("python -m helpers.run", description="Run notebooks 01 to 06.")
    parser.add_argument(
        "parameters", help="a file of notebooks/parameters without .yaml, or a path"
    )
    parser.add_argument("--publish", action="store_true", help="renew the committed notebooks")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        copies = notebooks.execute(arguments.parameters)
        if arguments.publish:
            notebooks.publish(copies)
            notebooks.publish_results(load_parameters(arguments.parameters)["run"])
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - start
    print(f"finished in {seconds:.0f} s; executed notebooks are in {copies[0].parent}")


if __name__ == "__main__":
    main()
