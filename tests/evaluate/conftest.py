"""Small Core ML packages, saved by coremltools and opened by us."""

import gc

import numpy as np
import pytest
from packages import save, silently

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package


@pytest.fixture(scope="module", autouse=True)
def quick_conversion():
    """Each conversion runs the garbage collector: spare it the modules, which take 0.3 s a run."""
    import coremltools  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def build(tmp_path):
    """Save `body(*inputs, *states)`, written with coremltools' builder, as a package of `main` alone.

    Inputs are `in_0`, ... of the shapes and types of the arrays given; states have a name and a shape.
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}

    def make(body, arrays, *, states=None, opset=ct.target.iOS18, precision=ct.precision.FLOAT32):
        inputs = {
            f"in_{index}": mb.placeholder(array.shape, dtype=kinds[array.dtype.name])
            for index, array in enumerate(arrays)
        }
        for name, shape in (states or {}).items():
            inputs[name] = mb.state_tensor_placeholder(shape, dtype=types.fp16)
        with Function(inputs, opset_version=opset) as function:
            made = body(*(function.inputs[name] for name in inputs))
            function.set_outputs(list(made) if isinstance(made, (tuple, list)) else [made])
        program = Program()
        program.add_function("main", function)
        model = silently(
            lambda: ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=opset,
                compute_precision=precision,
                # No pass folds, fuses or drops the op under test.
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
        )
        return save(model, tmp_path)

    return make


@pytest.fixture
def evaluate(build):
    """Outputs, in order, of one run of such a package."""

    def run(body, arrays, *, arithmetic="fp32", **options):
        arrays = [np.asarray(array) for array in arrays]
        evaluator = Evaluator(open_package(build(body, arrays, **options)), arithmetic)
        given = {f"in_{index}": array for index, array in enumerate(arrays)}
        return list(evaluator.run("main", given, evaluator.make_state()).values())

    return run
