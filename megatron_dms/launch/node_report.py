"""What a preflight found: the findings of each node, their comparison, the table and the JSON line."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dms.text_table import RULE, text_table

CHECKS = ("port", "gpus", "disk", "checkpoint", "data", "layout", "files", "versions", "all-reduce")
_COMPARED = {
    "versions": "install the same environment (or container image) and check out the same commit everywhere",
    "files": "make the checkpoints and data the same on all nodes: copy them again, or use a shared disk",
}
_WORDS = {True: "ok", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one node."""

    check: str
    """One of CHECKS."""
    passed: bool | None
    """None if the check was not run."""
    found: str = ""
    expected: str = ""
    fix: str = ""

    def line(self, node: str) -> str:
        """Say what a person must know about a failed check."""
        return f"{node}: {self.check}: found {self.found}; expected {self.expected}; fix: {self.fix}"


@dataclass
class NodeReport:
    """What one node reports about itself."""

    node: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Values by name that must be the same on all nodes, by the check that compares them."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NodeReport":
        """The inverse of to_dict."""
        findings = [Finding(**finding) for finding in values["findings"]]
        return cls(values["node"], findings, values["facts"])

    def passed(self, check: str) -> bool | None:
        """Whether the node passed all findings of a check; None if the check was not run."""
        outcomes = [finding.passed for finding in self.findings if finding.check == check]
        outcomes = [outcome for outcome in outcomes if outcome is not None]
        return all(outcomes) if outcomes else None


def compare(reports: Sequence[NodeReport]) -> None:
    """Add to each report whether its facts equal those of most nodes (in a tie: those of the first node)."""
    for check, fix in _COMPARED.items():
        having = [report for report in reports if check in report.facts]
        for name in dict.fromkeys(name for report in having for name in report.facts[check]):
            told = [(report, report.facts[check][name]) for report in having if name in report.facts[check]]
            usual = Counter(value for _, value in told).most_common(1)[0][0]
            where = next(report.node for report, value in told if value == usual)
            for report, value in told:
                expected = f"{name} {usual}, as on {where}"
                report.findings.append(Finding(check, value == usual, f"{name} {value}", expected, fix))


def failures(reports: Sequence[NodeReport]) -> list[str]:
    """The lines of all failed checks, node by node."""
    return [
        finding.line(report.node)
        for report in reports
        for finding in report.findings
        if finding.passed is False
    ]


def table(reports: Sequence[NodeReport]) -> str:
    """A table of nodes (down) and checks (across): ok, FAIL, or - for a check that was not run."""
    rows = [[report.node, *(_WORDS[report.passed(check)] for check in CHECKS)] for report in reports]
    return text_table([["node", *CHECKS], RULE, *rows], "<")


def summary(reports: Sequence[NodeReport]) -> dict[str, Any]:
    """The content of the JSON line."""
    return {
        "passed": not failures(reports),
        "nodes": {report.node: {check: report.passed(check) for check in CHECKS} for report in reports},
        "failures": failures(reports),
    }
