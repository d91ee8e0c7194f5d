"""Small Core ML packages in bundles, made by coremltools' own builder."""

import msgspec
import pytest
from test_bundle import make_manifest

from mobile_export import bundle, manifest


@pytest.fixture(scope="session")
def coreml_bundle(tmp_path_factory):
    """A bundle of functions `name -> (builder function, its input specs)`."""

    def make(functions, *, dtype="fp16", tools=None, minimum="18", spec=None, **convert):
        out = tmp_path_factory.mktemp("coreml") / "ios"
        made = msgspec.structs.replace(
            make_manifest(),
            platform="ios",
            target="coreml",
            tools=tools or {},
            runtime=manifest.Runtime(name="Core ML", minimum_version=minimum),
        )
        with bundle.create(out) as draft:
            _save(functions, draft.folder / "model.mlpackage", dtype, spec, convert)
            for path in sorted((draft.folder / "model.mlpackage").rglob("*")):
                if path.is_file():
                    draft.path(path.relative_to(draft.folder).as_posix(), "program")
            draft.finish(made)
        return bundle.load(out)

    return make


def _save(functions, path, dtype, spec, convert):
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Program

    program = Program()
    for name, (body, specs) in functions.items():
        program.add_function(name, mb.function(input_specs=specs, opset_version=ct.target.iOS18)(body))
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    precision = ct.precision.FLOAT32 if dtype == "fp32" else ct.precision.FLOAT16
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
        **convert,
    )
    if spec:
        spec(model._spec)
    model.save(str(path))
