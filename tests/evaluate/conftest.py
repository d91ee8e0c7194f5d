"""Small Core ML packages, saved by coremltools and opened by us."""

import pytest
from packages import save, silently

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package


@pytest.fixture
def build(tmp_path):
    """Save `body` (written with coremltools' builder) as a package of one function, `main`."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Program

    def make(body, specs, *, opset=ct.target.iOS18, precision="fp32", passes=()):
        program = Program()
        program.add_function("main", mb.function(input_specs=specs, opset_version=opset)(body))
        # No pass folds, fuses or drops the op under test.
        pipeline = ct.PassPipeline.EMPTY
        pipeline.passes = list(passes)
        model = silently(
            lambda: ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=opset,
                compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
        )
        return save(model, tmp_path)

    return make


@pytest.fixture
def evaluate(build):
    """Outputs, in order, of one run of a program of one function."""

    def run(body, specs, inputs, *, arithmetic="fp32", **options):
        evaluator = Evaluator(open_package(build(body, specs, **options)), arithmetic)
        return list(evaluator.run("main", inputs, evaluator.make_state()).values())

    return run
