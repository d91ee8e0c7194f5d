"""What a bundle will meet on a device, from documented rules: read, never executed.

The rules of a target are in the module of its name here: `RULES`, and `look(bundle)`, whose result
each rule's check is given. docs/lint.md has an entry for each rule; a test compares.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from mobile_export import console
from mobile_export.bundle import Bundle, verify
from mobile_export.errors import ExportError, nearest

Severity = Literal["info", "warning", "error"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


class Source(msgspec.Struct, frozen=True):
    """Where a rule is from."""

    title: str
    url: str = ""
    """Empty where there is none."""
    confidence: Literal["documented", "reported", "measured by us"] = "documented"


@dataclass(frozen=True)
class Rule:
    """One rule of a target."""

    id: str
    severity: Severity
    check: Callable[[Any], Iterable[str]]
    """What `look` returned -> a message for each finding, with this bundle's own numbers."""
    action: str
    """What to do about it."""
    sources: tuple[Source, ...]


class Finding(msgspec.Struct, frozen=True):
    """A rule that applies to a bundle."""

    rule: str
    severity: Severity
    message: str
    action: str
    sources: tuple[Source, ...]


class LintReport(msgspec.Struct, frozen=True):
    """What `lint` found, errors first."""

    target: str
    rules: list[str]
    """All that were checked."""
    findings: list[Finding]

    def count(self, severity: Severity) -> int:
        """Findings of that severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def fails(self, strict: bool = False) -> bool:
        """Whether there is an error or, if strict, a warning."""
        return bool(self.count("error") or (strict and self.count("warning")))


def targets() -> list[str]:
    """Targets that have rules."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def rules(target: str) -> tuple[Rule, ...]:
    """The rules of a target. ExportError when it has none."""
    return _module(target).RULES


def lint(bundle: Bundle) -> LintReport:
    """Verify a bundle and check it against its target's rules.

    Raises ExportError when the bundle is not as its manifest says, or its target has no rules.
    """
    verify(bundle)
    target = bundle.manifest.target
    module = _module(target)
    looked = module.look(bundle)
    findings = [
        Finding(rule.id, rule.severity, message, rule.action, rule.sources)
        for rule in module.RULES
        for message in rule.check(looked)
    ]
    findings.sort(key=lambda finding: _ORDER[finding.severity])
    return LintReport(target, [rule.id for rule in module.RULES], findings)


def render(report: LintReport) -> None:
    """Print a report for people."""
    for finding in report.findings:
        rows = [["", finding.message], ["do", finding.action]]
        for source in finding.sources:
            said = f"{source.title} {source.url}".rstrip()
            rows.append([source.confidence.split()[0], said])
        console.table(f"{finding.severity}  {finding.rule}", ["", ""], rows)
        console.say("")
    counts = ", ".join(f"{report.count(one)} {one}" for one in _ORDER)
    console.say(f"{len(report.rules)} rules of {report.target}: {counts}")


def _module(target: str) -> Any:
    known = targets()
    if target not in known:
        raise ExportError(f"there are no lint rules for target '{target}'", nearest(target, known))
    return importlib.import_module(f"{__name__}.{target}")
