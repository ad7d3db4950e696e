"""The whole fault suite, slow forms included, with what it went through: kills, changed bytes, payloads; and how long it took.

    python bench/faults.py [--workers 2] [--out bench/results/faults.json]

Runs every test that docs/faults.md names. Tests say by the fixture `tally` how often they did what; of a test that failed nothing is
counted. Needs the development environment (`make test` makes it). Exit code 1 where a test failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import torch

from tare.report.provenance import commit, device

ROOT = Path(__file__).parents[1]


NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(\w+(?:\[[^]`]*\])?))?`")


def wanted() -> list[str]:
    """What the tables name: files, or tests of a file (`::name` goes on with the file before), with `*` for any part of a parameter."""
    whole, found, last = set[str](), set[tuple[str, str]](), ""
    for path, name in NAMED.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8")):
        last = path or last
        if name:
            found.add((last, name))
        elif path:
            whole.add(path)
    return sorted({*whole, *(f"{path}::{name}" for path, name in found if path not in whole)})


def spelled_out(names: list[str]) -> list[str]:
    """Each test with a `*` as those that pytest finds."""
    files = sorted({name.partition("::")[0] for name in names if "*" in name})
    if not files:
        return names
    command = [
        sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-m", "slow or not slow", *files,
    ]  # fmt: skip
    known = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    made: list[str] = []
    for name in names:
        pattern = re.compile(re.escape(name).replace(r"\*", ".*"))
        found = [test for test in known if pattern.fullmatch(test)] if "*" in name else [name]
        if not found:
            raise SystemExit(f"docs/faults.md: no test is called {name}")
        made += found
    return made


def read(report: Path) -> dict[str, object]:
    """What a JUnit report says: outcomes, the failed by name, and the sums of tallies."""
    outcomes, tally, failed, spent = Counter[str](), Counter[str](), list[str](), defaultdict[str, float](float)
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes[kind] += 1
        spent[str(case.get("classname"))] += float(case.get("time") or 0.0)
        if kind in ("failure", "error"):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        if kind == "passed":
            for note in case.iter("property"):
                what = note.get("name") or ""
                if what.startswith("tally "):
                    tally[what.removeprefix("tally ")] += int(note.get("value") or 0)
    longest = {name: round(seconds) for name, seconds in sorted(spent.items(), key=lambda one: -one[1])[:10]}
    return {"outcomes": dict(outcomes), "failed": failed, "tally": dict(sorted(tally.items())), "longest": longest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="pytest processes")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "faults.json")
    args = parser.parse_args()
    named = wanted()
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", str(args.workers), "-m", "slow or not slow", "--durations=12",
            f"--junitxml={report}", *spelled_out(named),
        ]  # fmt: skip
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        seconds = time.monotonic() - started
        found = read(report)
    revision, changed = commit()
    result = {
        "kind": "faults", "format": 1, "commit": revision, "uncommitted_changes": changed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": device(), "torch": torch.__version__, "workers": args.workers,
        "tests": named, "seconds": round(seconds, 1), **found,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("outcomes", "failed", "tally", "longest", "seconds")}, indent=1))
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
