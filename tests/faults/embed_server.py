"""Forks workers that embed into a folder, from a process that is warm and has never run a thread.

Importing torch takes seconds, forking milliseconds. Commands come as JSON lines on stdin: {"start": job} answers
with the child's pid, {"wait": pid} with how it ended. A job holds the arguments of embed_to_folder, and "env",
"fsize" (RLIMIT_FSIZE), "slow" (seconds a batch) and "outcome" (a file that gets the result or the error).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any


class Children:
    """The test's side: start workers, kill them, learn how they ended."""

    def __init__(self, model: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._count = 0
        self._outcomes: dict[int, Path] = {}
        assert self._answer() == "ready"

    def start(self, data: list[Path], out: Path, **job: Any) -> int:
        self._count += 1
        outcome = out.parent / f"outcome-{self._count}.json"
        job = {**job, "data": [str(path) for path in data], "out": str(out), "outcome": str(outcome)}
        pid = self._ask({"start": job})
        self._outcomes[pid] = outcome
        return pid

    def wait(self, pid: int) -> tuple[int, dict[str, Any]]:
        """Exit code (minus the signal's number if one killed it) and what it said: "summary" or "error"."""
        code = self._ask({"wait": pid})
        outcome = self._outcomes.pop(pid)
        return code, json.loads(outcome.read_text()) if outcome.exists() else {}

    def run(self, data: list[Path], out: Path, **job: Any) -> tuple[int, dict[str, Any]]:
        return self.wait(self.start(data, out, **job))

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def main(model_folder: str) -> None:
    import threading

    import anndata
    import numpy as np
    import pandas as pd
    import torch

    import scfm
    import scfm.embed.run

    torch.set_num_threads(1)
    model = scfm.load(model_folder, dtype="float32", device="cpu")
    warnings.simplefilter("ignore", scfm.ScfmWarning)
    genes = list(model.vocab.median)[:9]
    cells = anndata.AnnData(np.ones((3, 9), dtype=np.float32), var=pd.DataFrame(index=genes))
    model.embed(cells, layer=0)
    assert threading.active_count() == 1
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(model, command["start"])
        print(json.dumps(pid), flush=True)


def _child(model: Any, job: dict[str, Any]) -> None:
    from scfm.embed.run import embed_to_folder

    outcome = Path(job.pop("outcome"))
    os.environ.update(job.pop("env", {}))
    slow, fsize = job.pop("slow", 0.0), job.pop("fsize", None)
    if slow:
        embed_batch = model.embed_batch

        def slowly(*args: Any, **options: Any) -> Any:
            time.sleep(slow)
            return embed_batch(*args, **options)

        model.embed_batch = slowly
    try:
        if fsize is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
        said = {"summary": embed_to_folder(job.pop("data"), model, job.pop("out"), **job).to_dict()}
    except BaseException as error:
        said = {"error": type(error).__name__, "message": str(error)}
    temporary = outcome.with_suffix(".part")
    temporary.write_text(json.dumps(said))
    temporary.replace(outcome)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
