"""What becomes of malformed inputs: `python benchmarks/malformed_inputs.py --inputs=2000`.

Valid files of every kind that is read here (recipes, weights, shards, images, vocabularies, JSON)
are spoilt by chance, behind right checksums too, and read as training, evaluation, conversion and
the report read them. Prints how many were read (what is bad within them left out), refused in one
clear line, crashed, hung or executed something; ends with status 1 if there is any of the last
three, each of which `--replay=KIND:SEED` repeats alone.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from chaos import fuzz  # noqa: E402  # pyright: ignore[reportMissingImports]


def show(finding):
    if finding.outcome in fuzz.BAD:
        print(f"{finding.outcome} {finding.kind}:{finding.seed}\n{finding.detail}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", default=",".join(fuzz.KINDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", help="KIND:SEED, one input alone")
    args = parser.parse_args()
    if args.replay:
        kind, _, seed = args.replay.partition(":")
        (finding,) = fuzz.run(1, int(seed), [kind], num_workers=1)
        print(f"{finding.outcome}: {finding.detail}")
        sys.exit(finding.outcome in fuzz.BAD)
    start = time.perf_counter()
    findings = fuzz.run(
        args.inputs, args.seed, args.kinds.split(","), num_workers=args.workers, report=show
    )
    print(fuzz.table(findings))
    print(f"in {time.perf_counter() - start:.0f} s")
    sys.exit(bool(fuzz.bad(findings)))


if __name__ == "__main__":
    main()
