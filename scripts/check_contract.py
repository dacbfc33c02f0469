#!/usr/bin/env python3
"""Starts the same PyTorch program with torchrun and with rr-launch, and compares what it prints.

The program, torch_program.py, trains over Gloo with four workers and prints its ranks, torchrun's
documented variables and its losses. It runs unchanged under both.

usage: check_contract.py      after cargo build --release, with a Python that has PyTorch
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
PROGRAM = ROOT / "scripts/torch_program.py"
WORKERS = 4
LINE = re.compile(r"rank \d+: .*")


def printed(command: list[str]) -> list[str]:
    """The program's lines, sorted."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"this command failed: {' '.join(command)}\n{done.stderr[-2000:]}")
    return sorted(LINE.findall(done.stdout))


def main() -> None:
    """Runs both, compares."""
    python = sys.executable
    theirs = printed(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS),
         str(PROGRAM)]
    )  # fmt: skip
    ours = printed(
        [str(BIN / "rr-launch"), "--cpu", "--nproc", str(WORKERS), "--", python, str(PROGRAM)]
    )
    expected = WORKERS * 14
    if len(theirs) != expected:
        sys.exit(f"check_contract: torchrun's workers printed {len(theirs)} lines, not {expected}")
    different = sorted(set(theirs) ^ set(ours))
    if ours != theirs:
        sys.exit("check_contract: only one of the two printed:\n" + "\n".join(different))
    print(f"check_contract: {WORKERS} workers printed the same {len(ours)} lines under both")


if __name__ == "__main__":
    main()
