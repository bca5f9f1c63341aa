"""`make mutants`: does the suite notice when a condition of the security is taken away?"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mutants import MUTANTS
from mutants.run import BROKEN, SURVIVED, Copy, chosen, examine_all, summary, unchanged


def main() -> int:
    args = arguments()
    mutants = chosen(MUTANTS, args.names)
    if not mutants:
        print(f"no mutant is called {' or '.join(args.names)}; --list shows all")
        return 2
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name:40} {mutant.loses}")
        return 0
    with tempfile.TemporaryDirectory(prefix="tacit-mutants-") as folder:
        if wrong := unchanged(Copy(Path(folder) / "unchanged"), mutants, args.seconds):
            print(f"the tests do not pass on the tree as it is: {wrong}")
            return 2
        results = []
        for r in examine_all(Path(folder), mutants, args.jobs, args.seconds):
            print(f"{r.mutant.name:40} | {r.verdict}: {r.detail} | {r.seconds:.0f} s", flush=True)
            results.append(r)
    print(summary(results))
    return int(any(r.verdict in (SURVIVED, BROKEN) for r in results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or patterns of names; all without")
    parser.add_argument("--list", action="store_true", help="show what each gives away, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    parser.add_argument("--seconds", type=float, default=300, help="for one test file: one that takes longer hangs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
