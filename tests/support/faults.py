"""Put faults into a run from outside: no code of the project knows that it is tested."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.retrofit import ROOT, Workspace, environment

TIMEOUT = 240  # seconds for one run, so that one that does not end fails the test

# This code runs in each process before the script. `before(rank, step, microbatch, model)` is called at each
# training microbatch. Steps and microbatches are counted from 1.
_PRELUDE = """
import importlib.abc, importlib.machinery, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron_dms.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            call, count = module.RetrofitStep.__call__, {}
            def counted(self, data, model):
                if model.training:
                    step = module.get_args().curr_iteration + 1
                    count[step] = count.get(step, 0) + 1
                    before(int(os.environ["RANK"]), step, count[step], model)
                return call(self, data, model)
            module.RetrofitStep.__call__ = counted
        spec.loader.exec_module = exec_module
        return spec

if "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())

"""


@dataclass
class Ended:
    """How a run ended."""

    status: int
    log: str

    def line(self, *words: str) -> str:
        """Return the only line of the log that holds all words."""
        lines = [line for line in self.log.splitlines() if all(word in line for word in words)]
        assert len(lines) == 1, f"{len(lines)} lines with {words} in\n{self.log[-6000:]}"
        return lines[0]


def run_with(fault: str, workspace: Workspace, folder: Path, processes: int, *flags: str) -> Ended:
    """Run once with a fault, which is the source of `def before(rank, step, microbatch, model)`."""
    (folder / "sitecustomize.py").write_text(_PRELUDE + fault)
    settings = environment() | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = workspace.command(processes, *flags)
    command[command.index("torch.distributed.run")] = "megatron_dms.launch.elastic"
    with (folder / "log").open("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=settings, timeout=TIMEOUT)
    return Ended(done.returncode, (folder / "log").read_text())
