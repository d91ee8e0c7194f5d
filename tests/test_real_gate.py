"""The default model's artefacts at what it is for, against what they did when golden/ was recorded."""

from pathlib import Path

import msgspec
import pytest

from mobile_export.tasks.evaluate import Work, evaluate
from mobile_export.tasks.reports import TaskReport, changes

pytestmark = pytest.mark.real
BASELINE = Path(__file__).parents[1] / "golden/qwen2.5-coder-0.5b-instruct/gate.json"
PROBLEMS = 3


@pytest.mark.parametrize("platform", ["android", "onnx"])
def test_it_predicts_and_programs_as_before(platform, real_bundles):
    before = msgspec.json.decode(BASELINE.read_bytes(), type=TaskReport)
    now = evaluate([real_bundles(platform)], source=False, before=before, work=Work(code=PROBLEMS))
    assert now.passed, now.verdicts
    found = changes(before, now)
    assert {one.what for one in found} >= {"perplexity, all", "passes"}
    assert not [one for one in found if one.worse]
    (result,) = [one for one in now.contenders if one.name != "source"]
    assert result.passes >= PROBLEMS - 1, result.code
