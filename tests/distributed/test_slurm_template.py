"""The batch script of a pretraining run with Slurm's commands played by others: what it starts, passes on and requeues.

srun, scontrol and scancel are short scripts on PATH; torchrun is the real one where its options and signals matter.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "pretrain.sbatch"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")

SCONTROL = """
echo "scontrol $*" >> "$LOG"
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; fi
"""
SRUN = """
echo "srun $*" >> "$LOG"
while [ "${1#--}" != "$1" ]; do shift; done
echo $$ > "$PID_FILE"
exec "$@"
"""
SCANCEL = """
echo "scancel $*" >> "$LOG"
kill -USR1 "$(cat "$PID_FILE")"
"""
# What stands in for torchrun; BEHAVE says how it ends.
TORCHRUN = """
echo "torchrun $*" >> "$LOG"
echo "threads=$OMP_NUM_THREADS patience=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$LOG"
save() { sleep 0.3; echo saved >> "$LOG"; exit 1; }
trap save USR1 TERM
echo ready >> "$LOG"
case "$BEHAVE" in
    finish) exit 0;;
    fail) exit 7;;
    wait) while :; do sleep 0.05; done;;
esac
"""
# What stands in for scfm below the real torchrun.
SCFM = """
echo "scfm rank $RANK of $WORLD_SIZE: $*" >> "$LOG"
trap 'echo "rank $RANK saved" >> "$LOG"; exit 0' USR1
echo ready >> "$LOG"
while :; do sleep 0.05; done
"""


class Job:
    """A folder of commands, the log that they write, and the script started among them."""

    def __init__(self, folder: Path, commands: dict[str, str]) -> None:
        self.log = folder / "log"
        self.log.touch()
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, text in commands.items():
            path = bin_folder / name
            path.write_text(f"#!{BASH}\n{text}")
            path.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "PID_FILE": str(folder / "pid"),
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "1",
            "OMP_NUM_THREADS": "3",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BASH), str(SCRIPT), *arguments],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, line: str, count: int = 1, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while self.lines().count(line) < count:
            assert time.monotonic() < end, self.lines()
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path, {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL, "torchrun": TORCHRUN})


def test_bash_can_read_it() -> None:
    for script in SCRIPT.parent.glob("*.sbatch"):
        subprocess.run([str(BASH), "-n", str(script)], check=True)


def test_it_says_how_it_is_used(job) -> None:
    done = job.start()
    assert done.wait() == 2 and "usage" in done.communicate()[0] and not job.lines()


def test_it_starts_torchrun_on_every_machine(job) -> None:
    done = job.start("run.toml", "out=/scratch/a b", BEHAVE="finish", SLURM_NNODES="4", MIN_NODES="2")
    assert done.wait() == 0
    lines = job.lines()
    (started,) = [line for line in lines if line.startswith("torchrun")]
    for option in (
        "--nnodes=2:4", "--nproc-per-node=gpu", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=4321",
        "--rdzv-endpoint=localhost:24321", "--no-python scfm pretrain run.toml out=/scratch/a b",
    ):  # fmt: skip
        assert option in started
    assert "threads=3 patience=270" in lines
    assert not [line for line in lines if "requeue" in line]


def test_a_failure_is_the_jobs_failure(job) -> None:
    assert job.start("run.toml", BEHAVE="fail").wait() == 7
    assert not [line for line in job.lines() if "requeue" in line or "scancel" in line]


def test_before_the_time_limit_it_saves_and_then_queues_again(job) -> None:
    running = job.start("run.toml", BEHAVE="wait")
    job.wait_for("ready")
    running.send_signal(signal.SIGUSR1)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=60) == 0
    lines = job.lines()
    assert "scancel --signal=USR1 4321.0" in lines
    assert lines.index("saved") < lines.index("scontrol requeue 4321") == len(lines) - 1


def test_preempted_it_saves_and_leaves_the_queue_to_slurm(job) -> None:
    running = job.start("run.toml", BEHAVE="wait")
    job.wait_for("ready")
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 0
    assert "saved" in job.lines() and not [line for line in job.lines() if "requeue" in line]


def test_the_real_torchrun_takes_the_options_and_passes_the_signal_on(tmp_path) -> None:
    job = Job(tmp_path, {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL, "scfm": SCFM})
    running = job.start("run.toml", "seed=1", PROCESSES_PER_NODE="2")
    job.wait_for("ready", count=2)
    assert sorted(line for line in job.lines() if line.startswith("scfm")) == [
        f"scfm rank {rank} of 2: pretrain run.toml seed=1" for rank in (0, 1)
    ]
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=60) == 0, running.communicate()[0]
    assert {"rank 0 saved", "rank 1 saved"} <= set(job.lines())
    assert job.lines()[-1] == "scontrol requeue 4321"
