"""The process that runs the flows on their schedule: `python -m flows.runner --workspace DIR`.

`abnloop serve` starts it, and starts it again when it ends: Prefect's runner gives up when its server is away for
about half a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flows import services
from flows.workspace import open_workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True)
    place = open_workspace(parser.parse_args().workspace)
    try:
        services.connect(place)
        from flows.serve import serve

        serve(place)
    except (ValueError, OSError) as error:
        print(f"abnloop: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
