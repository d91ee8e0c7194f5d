import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from test_lint_coreml import step

from mobile_export import bundle, manifest
from mobile_export.cli import cli as commands
from mobile_export.errors import ExportError
from mobile_export.lint import Finding, LintReport, lint, render, rules, targets

DOC = Path(__file__).parents[2] / "docs" / "lint.md"


def entries():
    """Text of each rule's entry in the document, by id."""
    parts = re.split(r"^### `(.+)`$", DOC.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def every_rule():
    return {rule.id: rule for target in targets() for rule in rules(target)}


def test_the_document_has_the_rules_of_the_code_and_no_other():
    assert list(entries()) == sorted(entries(), key=lambda name: name.split("-")[0])
    assert entries().keys() == every_rule().keys()


@pytest.mark.parametrize("rule", every_rule().values(), ids=lambda rule: rule.id)
def test_an_entry_says_how_bad_and_names_each_source(rule):
    entry = entries()[rule.id]
    assert f"- Severity: {rule.severity}" in entry
    assert all(f"- {word}: " in entry for word in ("What", "Why", "Do"))
    assert rule.sources
    for source in rule.sources:
        assert (source.url or source.title) in entry
        assert source.confidence in entry


def test_ids_are_used_once_and_begin_with_their_target():
    for target in targets():
        names = [rule.id for rule in rules(target)]
        assert len(set(names)) == len(names)
        assert all(name.startswith(f"{target}-") for name in names)


def report(*severities):
    return LintReport("executorch", [], [Finding("r", one, "m", "a", ()) for one in severities])


def test_errors_fail_always_and_warnings_when_strict():
    assert not report("info").fails(strict=True)
    assert not report("info", "warning").fails()
    assert report("warning").fails(strict=True)
    assert report("error").fails()


def test_a_damaged_bundle_is_not_looked_into(sandbox_bundle, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sandbox_bundle.folder, folder)
    with (folder / "model.pte").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(ExportError, match=r"'model.pte' was altered"):
        lint(bundle.load(folder))


@pytest.mark.parametrize("target", ["reference", "_coreml_sources", "../x", ""])
def test_a_target_without_rules(sandbox_bundle, tmp_path, target):
    folder = tmp_path / "copy"
    shutil.copytree(sandbox_bundle.folder, folder)
    changed = msgspec.structs.replace(sandbox_bundle.manifest, target=target)
    (folder / bundle.MANIFEST).write_bytes(manifest.encode(changed))
    with pytest.raises(ExportError, match="no lint rules"):
        lint(bundle.load(folder))


def test_a_table_has_message_action_and_source(sandbox_bundle, capsys):
    found = lint(sandbox_bundle)
    render(found)
    printed = capsys.readouterr().out
    for finding in found.findings:
        assert finding.rule in printed and finding.message in printed and finding.action in printed
    assert printed.splitlines()[-1].startswith(f"{len(rules('executorch'))} rules of executorch: 0 error")


def test_the_command(cli, sandbox_bundle, tmp_path):
    done = cli("lint", sandbox_bundle.folder, "--json")
    assert done.returncode == 0, done.stderr
    assert msgspec.convert(json.loads(done.stdout), LintReport) == lint(sandbox_bundle)
    missing = cli("lint", tmp_path / "none")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ")


@pytest.fixture
def invoke():
    """The command in this process: its exit code and what it printed."""

    def run(*arguments):
        done = CliRunner().invoke(commands, ["lint", *map(str, arguments)])
        return done.exit_code, done.output

    return run


def test_the_command_strict(invoke, coreml_bundle):
    folder = coreml_bundle({"main": step(48)}).folder
    assert invoke(folder)[0] == 0
    code, printed = invoke(folder, "--strict")
    assert code == 1 and "coreml-state-width" in printed


def test_the_command_with_an_error(invoke, coreml_bundle):
    assert invoke(coreml_bundle({"main": step()}, minimum="17").folder)[0] == 1
