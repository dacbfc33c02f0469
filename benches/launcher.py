#!/usr/bin/env python3
"""What a launcher costs: rr-launch against torchrun, and accelerate launch where it can.

Every launcher starts the same C program (launcher_worker.c), in turns. Measured are

- start: from the command to the moment at which the last worker's main began; in the column "system"
  a C program that does nothing else than to start them one after the other;
- memory: of the launcher's own processes (not its workers) while 8 workers sleep, RSS and PSS;
- cpu: the time on the CPU of these processes meanwhile, scaled to an hour;
- death: from SIGKILL to the last rank until the launcher and all workers have ended;
- log: 8 workers write 100,000 lines of 100 bytes a second in all, or as fast as it goes; the console
  is a file, and each rank has a log file: how long the workers take, when the console has all
  lines, and the launcher's time on the CPU until then.

accelerate launch starts several workers only for GPUs (it takes --multi_gpu without looking whether
there are any) and then is torchrun with more imports.

usage: launcher.py [--rounds 5] [--idle 30] [--only start memory death log] [--result FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import BIN, ROOT, machine

WORKERS = (1, 8, 64)
USUAL = 8
LINES_A_SECOND = 100_000
LOG_SECONDS = 5
FLOOD_LINES = 100_000
GIVE_UP_AFTER_S = 180
WORKER = "launch-worker"
OURS = "rr-launch"
PEER = "torchrun"
ACCELERATE = "accelerate"
SYSTEM = "system"


def command(side: str, workers: int, program: list[str], logs: Path | None = None) -> list[str]:
    """How `side` starts `workers` times `program`; with `logs`, to the console and to files."""
    if side == SYSTEM:
        binary, _, folder = program
        return [binary, "fork", folder, str(workers)]
    if side == OURS:
        flags = ["--log-dir", str(logs)] if logs else []
        return [str(BIN / OURS), "--cpu", "--nproc", str(workers), *flags, "--", *program]
    tee = ["--tee", "3", "--log_dir", str(logs)] if logs else []
    if side == PEER:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(workers), *tee]
        return [sys.executable, "-m", *launch, "--no_python", *program]
    launch = ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    kind = ["--multi_gpu"] if workers > 1 else ["--cpu"]
    launch += ["--dynamo_backend", "no", "--num_processes", str(workers), *kind, *tee]
    return [sys.executable, "-m", *launch, "--no_python", *program]


@dataclass
class Launch:
    """A running launcher."""

    process: subprocess.Popen
    began_ns: int
    folder: Path
    output: Path
    workers: int

    def notes(self) -> dict[int, int]:
        """What each worker has noted, once all have."""
        limit = time.monotonic() + GIVE_UP_AFTER_S
        while time.monotonic() < limit:
            names = [name for name in os.listdir(self.folder) if name.isdigit()]
            if len(names) == self.workers:
                return {int(name): int((self.folder / name).read_text()) for name in names}
            # The times are the workers': to look more often would only take a core from them.
            time.sleep(0.02)
        self.fail("its workers did not begin")

    def own_processes(self) -> list[int]:
        """The launcher and what it has started, but for the workers."""
        parents = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
        own, size = {self.process.pid}, 0
        while len(own) > size:
            size = len(own)
            own |= {pid for pid, parent in parents.items() if parent in own}
        return sorted(pid for pid in own if not is_worker(pid))

    def fail(self, what: str) -> None:
        """Ends the benchmark with the end of what the launcher said."""
        self.process.kill()
        tail = "\n".join(self.output.read_text("utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"{what}: {' '.join(map(str, self.process.args))}\n{tail}")


@contextmanager
def launched(side: str, workers: int, worker: Path, *args: str, logs: bool = False) -> Iterator[Launch]:
    """Starts a launcher, whose console is a file; ends it if it is still there afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "notes", Path(temporary) / "console"
        folder.mkdir()
        program = [str(worker), args[0], str(folder), *args[1:]]
        line = command(side, workers, program, Path(temporary) / "logs" if logs else None)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with output.open("wb") as console:
            began = time.monotonic_ns()
            process = subprocess.Popen(line, stdout=console, stderr=console, env=environment)
            launch = Launch(process, began, folder, output, workers)
            try:
                yield launch
            finally:
                process.terminate()
                process.wait()


def is_worker(pid: int) -> bool:
    """Whether a process runs the worker."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == WORKER
    except OSError:
        return True


def smaps(pid: int, key: str) -> float:
    """A sum of /proc/PID/smaps_rollup, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def cpu_seconds(pids: list[int]) -> float:
    """The time that all threads of the processes have spent on a CPU."""
    tasks = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


@dataclass
class Figures:
    """Values by measure and side, and what to call them."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, measure: str, side: str, value: float) -> None:
        """Keeps a value and prints it."""
        self.values.setdefault(measure, {}).setdefault(side, []).append(value)
        print(f"{measure}: {side} {value:.4g}", flush=True)

    def table(self) -> list[dict]:
        """Medians, and how many times as much the others take as ours does."""
        rows = []
        for measure, sides in self.values.items():
            medians = {side: statistics.median(values) for side, values in sides.items()}
            ours = medians[OURS]
            ratios = {side: medians[side] / ours if ours else None for side in medians}
            ratios.pop(OURS)
            rows.append({"measure": measure, "median": medians, "ratio": ratios})
        return rows


def measure_start(side: str, worker: Path, figures: Figures) -> None:
    """From the command to the last worker's main."""
    for workers in WORKERS:
        with launched(side, workers, worker, "start") as launch:
            last = max(launch.notes().values())
            if launch.process.wait() != 0:
                launch.fail("it failed")
        figures.add(f"start of {workers}, s", side, (last - launch.began_ns) / 1e9)


def measure_idle(side: str, worker: Path, figures: Figures, idle: float) -> None:
    """Memory, time on the CPU, and the end after a death."""
    with launched(side, USUAL, worker, "sleep") as launch:
        pids = launch.notes()
        time.sleep(3)
        own = launch.own_processes()
        for key in ("Rss", "Pss"):
            figures.add(f"memory, {key} in MiB", side, sum(smaps(pid, key) for pid in own))
        before, begin = cpu_seconds(own), time.monotonic()
        time.sleep(idle)
        used = (cpu_seconds(own) - before) / (time.monotonic() - begin)
        figures.add("CPU while idle, s an hour", side, used * 3600)
        begin = time.monotonic()
        os.kill(pids[USUAL - 1], 9)
        launch.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
            time.sleep(0.001)
        figures.add("from a death to the end, s", side, time.monotonic() - begin)


def measure_log(side: str, worker: Path, figures: Figures) -> None:
    """8 workers that write at a rate, and as fast as they can."""
    rate = LINES_A_SECOND // USUAL
    for name, lines, each in (("100,000 lines/s", rate * LOG_SECONDS, rate), ("flood", FLOOD_LINES, 0)):
        with launched(side, USUAL, worker, "log", str(lines), str(each), logs=True) as launch:
            slowest = max(launch.notes().values()) / 1e9
            begin = launch.began_ns / 1e9
            wait_for_lines(launch, lines * USUAL)
            shown = time.monotonic() - begin
            used = cpu_seconds(launch.own_processes())
            (launch.folder / "go").touch()
            if launch.process.wait() != 0:
                launch.fail("it failed")
        figures.add(f"{name}: the slowest worker, s", side, slowest)
        figures.add(f"{name}: command to last line on the console, s", side, shown)
        figures.add(f"{name}: the launcher's CPU, s", side, used)


def wait_for_lines(launch: Launch, count: int) -> None:
    """Waits until the console has so many lines of workers, each whole."""
    limit = time.monotonic() + GIVE_UP_AFTER_S
    with launch.output.open("rb") as console:
        rest, found = b"", 0
        while found < count:
            chunk = console.read(1 << 20)
            *lines, rest = (rest + chunk).split(b"\n")
            found += sum(line.endswith(b"xxxx") for line in lines)
            if time.monotonic() > limit:
                launch.fail(f"{found} of {count} lines")
            if not chunk:
                time.sleep(0.01)


def can_launch(side: str, worker: Path) -> bool:
    """Whether a side is there and starts several workers on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        line = command(side, 2, [str(worker), "start", folder])
        done = subprocess.run(line, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode == 0 and len(os.listdir(folder)) == 2


def build_worker(folder: Path) -> Path:
    """Compiles the worker."""
    worker = folder / WORKER
    source = ROOT / "benches" / "launcher_worker.c"
    compiler = shutil.which(os.environ.get("CC", "cc")) or sys.exit("a C compiler is needed: set CC")
    subprocess.run([compiler, "-O2", "-o", str(worker), str(source)], check=True)
    return worker


def main() -> None:
    """Parses the arguments, runs the rounds, sums up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=30, help="seconds of idling that are measured")
    kinds = ["start", "memory", "log"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    if not (BIN / OURS).is_file():
        sys.exit(f"{BIN / OURS} is missing: run cargo build --release -p rr-launch first")
    measures: dict[str, Callable[[str, Path, Figures], None]] = {
        "start": measure_start,
        "memory": lambda side, worker, figures: measure_idle(side, worker, figures, arguments.idle),
        "log": measure_log,
    }
    figures = Figures()
    with tempfile.TemporaryDirectory() as temporary:
        worker = build_worker(Path(temporary))
        # Also brings each into the page cache.
        sides = [side for side in (OURS, PEER, ACCELERATE) if can_launch(side, worker)]
        for missing in {OURS, PEER} - set(sides):
            sys.exit(f"{missing} does not start two workers here")
        for turn in range(arguments.rounds):
            for kind in arguments.only:
                for side in [*sides, SYSTEM] if kind == "start" else sides:
                    print(f"round {turn + 1}: ", end="")
                    measures[kind](side, worker, figures)
    report(figures, arguments.result)


def report(figures: Figures, result: Path | None) -> None:
    """Prints medians and ratios, and keeps them."""
    rows = figures.table()
    print(f"\n{'median':50} {OURS:>10} {PEER:>10} {ACCELERATE:>10} {SYSTEM:>10}   ratios")
    for row in rows:
        cells = [row["median"].get(side) for side in (OURS, PEER, ACCELERATE, SYSTEM)]
        cells = " ".join("-".rjust(10) if cell is None else f"{cell:10.4g}" for cell in cells)
        ratios = ", ".join("-" if ratio is None else f"{ratio:.3g}" for ratio in row["ratio"].values())
        print(f"{row['measure']:50} {cells}   {ratios}")
    if result:
        record = {
            "benchmark": "launcher",
            "command": " ".join(["python", *sys.argv]),
            "load": os.getloadavg(),
            "rows": rows,
            "values": figures.values,
            "machine": machine(),
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
