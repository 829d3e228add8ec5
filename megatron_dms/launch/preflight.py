"""The preflight of a job: one process per node; all of them meet at the port that training will use.

The order is: the port, what the node can check alone (node_checks.py), an all-reduce over all ranks
(all_reduce.py) once every node is there, and the comparison of all reports by the first node
(node_report.py). A node that says nothing within the time limit is named: reports travel through a TCPStore,
not through a collective.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_dms.command_line import say
from megatron_dms.launch import node_checks
from megatron_dms.launch.node_report import Finding, NodeReport, compare, failures, summary, table

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_GRACE = 15  # seconds that one node may be slower than another at the same step
_A_MOMENT = 0.1  # seconds to wait for a report that should be there already
_LAST_WORDS = 300  # characters of a failed process's last line that are shown


@dataclass(frozen=True)
class Preflight:
    """One node's part of the preflight."""

    hosts: tuple[str, ...]
    """All nodes, by rank; the first is where they meet."""
    node_rank: int
    """The rank of this node, from 0."""
    gpus_per_node: int
    """Processes of the run on each node."""
    port: int
    """Port of the first node at which training will meet."""
    device: str
    """cuda (NCCL) or cpu (gloo)."""
    minimum_free_gb: float
    """Free disk at --save, in GB."""
    timeout: float
    """Seconds for the nodes to meet and check themselves, and again for the all-reduce."""
    training: tuple[str, ...]
    """The command line of pretrain_dms.py."""

    @property
    def node(self) -> str:
        return self.name(self.node_rank)

    @property
    def world(self) -> int:
        return len(self.hosts) * self.gpus_per_node

    def name(self, rank: int) -> str:
        """The name of a node in messages."""
        return f"node {rank} ({self.hosts[rank]})"

    def run(self) -> int:
        """Check this node and say what was found; the first node prints the table and the JSON line.

        Returns:
            0 if every check of every node passed, otherwise 1; the value is the same on every node that
            was heard.

        Raises:
            ValueError: a size in the training flags is no whole number.
        """
        flags = node_checks.training_flags(self.training)
        try:
            store = self._meet()
        except (RuntimeError, OSError) as error:
            say(self._port_failure(error).line(self.node))
            return 1
        report = self._check_alone(flags)
        self._set(store, "ready", self.node_rank, report.passed("gpus") is True)
        complete = self._all_ready(store)
        report.findings.append(self._all_reduce() if complete else Finding("all-reduce", None))
        self._set(store, "report", self.node_rank, report.to_dict())
        return self._conclude(store, _GRACE if complete else _GRACE / 5)

    def _meet(self) -> "TCPStore":
        import torch.distributed as dist

        return dist.TCPStore(
            self.hosts[0],
            self.port,
            is_master=self.node_rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout),
        )

    def _port_failure(self, error: Exception) -> Finding:
        reason = str(error).splitlines()[0]
        if self.node_rank == 0:
            fix = "set PORT to another one: some process on this node holds it"
            return Finding("port", False, f"port {self.port} cannot be opened ({reason})", "a free port", fix)
        fix = "see that the first node's name resolves here, that no firewall blocks PORT, and its own log"
        expected = f"a connection within {self.timeout:g} s"
        return Finding("port", False, f"no answer from {self.hosts[0]}:{self.port} ({reason})", expected, fix)

    def _check_alone(self, flags: Namespace) -> NodeReport:
        checkpoints, weights = node_checks.check_checkpoints(flags)
        data, tokens = node_checks.check_data(flags)
        findings = [
            Finding("port", True, str(self.port)),
            node_checks.check_gpus(self.device, self.gpus_per_node),
            node_checks.check_disk(flags.save, self.minimum_free_gb),
            *checkpoints,
            *data,
        ]
        if self.node_rank == 0:  # every node would find the same
            findings += node_checks.check_processes(flags, self.world)
        facts = {"files": weights | tokens, "versions": node_checks.versions(self.device)}
        return NodeReport(self.node, findings, facts)

    def _all_ready(self, store: "TCPStore") -> bool:
        """Whether all nodes are there with their GPUs: an all-reduce would hang if one were missing."""
        if self.node_rank == 0:
            self._set(store, "go", 0, all(self._get_all(store, "ready", self.timeout)))
        return bool(self._get(store, "go", 0, 2 * self.timeout + _GRACE))

    def _all_reduce(self) -> Finding:
        """Start the ranks of this node for the all-reduce, and end them when the time is up."""
        common = ["--host", self.hosts[0], "--port", str(self.port), "--world", str(self.world)]
        common += ["--device", self.device, "--seconds", str(self.timeout)]
        processes = []
        for local in range(self.gpus_per_node):
            rank = self.node_rank * self.gpus_per_node + local
            command = [sys.executable, "-m", "megatron_dms.launch.all_reduce", *common]
            command += ["--rank", str(rank), "--local-rank", str(local)]
            process = subprocess.Popen(
                command, text=True, cwd=node_checks.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            processes.append((rank, process))
        end = time.monotonic() + self.timeout
        wrong, seconds = [], 0.0
        for rank, process in processes:
            try:
                out, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                wrong.append(f"rank {rank} not done after {self.timeout:g} s")
                continue
            if process.returncode:
                words = (errors.strip().splitlines() or ["no word"])[-1][:_LAST_WORDS]
                wrong.append(f"rank {rank} ended with status {process.returncode}: {words}")
            else:
                seconds = max(seconds, json.loads(out.splitlines()[-1])["seconds"])
        expected = f"the sum over {self.world} ranks within {self.timeout:g} s"
        fix = "set export NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME in the env file, or exclude this node"
        return Finding("all-reduce", not wrong, "; ".join(wrong) or f"{seconds:.3f} s", expected, fix)

    def _conclude(self, store: "TCPStore", grace: float) -> int:
        """Let the first node decide for all; it stays until the others know, because its store ends with it.

        Args:
            grace: seconds in which the other nodes may still end their ranks.
        """
        if self.node_rank:
            passed = self._get(store, "verdict", 0, 2 * self.timeout + _GRACE)
            if passed is None:
                say(f"{self.node}: the first node, {self.hosts[0]}, gave no verdict; see its own lines")
                return 1
            self._set(store, "bye", self.node_rank, True)
            return 0 if passed else 1
        told = self._get_all(store, "report", grace)
        reports = [
            NodeReport.from_dict(values) if values else self._silent(rank) for rank, values in enumerate(told)
        ]
        compare(reports)
        for line in failures(reports):
            say(line)
        print(table(reports))
        print(json.dumps(summary(reports)), flush=True)
        passed = not failures(reports)
        self._set(store, "verdict", 0, passed)
        for rank, values in enumerate(told):
            if rank and values:
                self._get(store, "bye", rank, _GRACE)
        return 0 if passed else 1

    def _silent(self, rank: int) -> NodeReport:
        found = f"no word from it within {self.timeout:g} s"
        fix = "look at that node's own lines; if there are none, the node or its container did not start"
        return NodeReport(self.name(rank), [Finding("port", False, found, "a report", fix)])

    @staticmethod
    def _set(store: "TCPStore", key: str, rank: int, value: object) -> None:
        store.set(f"preflight/{key}/{rank}", json.dumps(value))

    def _get_all(self, store: "TCPStore", key: str, seconds: float) -> list[Any]:
        """The values of all nodes, by rank; None for a node that says nothing in time."""
        end = time.monotonic() + seconds
        ranks = range(len(self.hosts))
        return [self._get(store, key, rank, max(_A_MOMENT, end - time.monotonic())) for rank in ranks]

    @staticmethod
    def _get(store: "TCPStore", key: str, rank: int, seconds: float) -> Any:
        """The value, or None if no value is there in time."""
        name = f"preflight/{key}/{rank}"
        try:
            store.wait([name], timedelta(seconds=seconds))
            return json.loads(store.get(name))
        except RuntimeError:  # torch.distributed.DistStoreError, and a first node that is gone
            return None
