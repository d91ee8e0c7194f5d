"""Recipes: what is read, and each way to be wrong named by the key's path."""

import msgspec
import pytest

from mobile_export.errors import ExportError
from mobile_export.recipe import load_recipe, parse_recipe, recipe_folder


@pytest.fixture
def recipe(tmp_path):
    """Load a recipe from its text."""

    def load(text, **more):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(str(path), **more)

    return load


@pytest.mark.parametrize("name", sorted(file.stem for file in recipe_folder().glob("*.toml")))
def test_the_packages_recipes_are_named_as_their_files(name):
    assert load_recipe(name).name == name


def test_a_file_may_say_little(recipe):
    made = recipe('[executorch]\nkv_cache = "int8"\n')
    assert (made.name, made.context, made.executorch.kv_cache) == ("mine", 2048, "int8")
    assert recipe("context = 99").context == 99
    assert recipe("context = 99", context=7).context == 7


def test_the_digest_is_of_the_values_alone(recipe):
    first = recipe("context = 99\n[executorch]\nall_logits = true\n")
    assert first.digest == recipe("# said otherwise\ncontext=99").digest
    others = [
        recipe("context = 98"),
        recipe("context = 99\n[executorch]\nall_logits = false"),
        recipe("context = 99\n[parity.cut]\nkl_max = 0.1"),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_a_manifests_table_gives_the_same_recipe():
    made = load_recipe("sandbox", context=33)
    assert parse_recipe(msgspec.to_builtins(made)) == made


WRONG = {
    "contxt = 5": "unknown recipe key 'contxt'; did you mean 'context'",
    "[executorch]\nkv_cach = 'int8'": "unknown recipe key 'executorch.kv_cach'; did you mean 'kv_cache'",
    "[parity.total]\nkl_mean = 1.0\ntop_1 = 1.0": "'parity.total.top_1'; did you mean 'top1'",
    "[parity.total]\nkl_mean = 1.0": "recipe key 'parity.total': .*missing required field `top1`",
    "context = 'many'": "recipe key 'context': Expected `int`, got `str`; correct the recipe",
    "context = 2.5": "recipe key 'context': Expected `int`, got `float`",
    "[parity.cut]\nmargin = 'wide'": "recipe key 'parity.cut.margin': Expected `float`, got `str`",
    "[executorch]\nkv_cache = 'int4'": "recipe key 'executorch.kv_cache': Invalid enum value 'int4'",
    "[quantize]\nrounding = 'stochastic'": "recipe key 'quantize.rounding': Invalid enum value 'stochastic'",
    "executorch = 3": "recipe key 'executorch': Expected `object`, got `int`",
    "context = 0": "context 0 is too small; use --context 1 or more",
    "context = -4": "context -4 is too small",
    "context =": "cannot read recipe '.*mine.toml': Invalid value",
    "a = 1\na = 2": "cannot read recipe '.*mine.toml': Cannot overwrite",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(recipe, text):
    with pytest.raises(ExportError, match=WRONG[text]):
        recipe(text)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ExportError, match="unknown recipe 'int9'; did you mean 'int8'"):
        load_recipe("int9")
    with pytest.raises(ExportError, match="unknown recipe '../int8'"):
        load_recipe("../int8")
    missing = tmp_path / "none.toml"
    with pytest.raises(ExportError, match="cannot read recipe '.*none.toml': No such file"):
        load_recipe(str(missing))
    missing.write_bytes(b"\xff\xfe")
    with pytest.raises(ExportError, match="cannot read recipe '.*none.toml': .*utf-8"):
        load_recipe(str(missing))
    with pytest.raises(ExportError, match="context 0 is too small"):
        load_recipe(context=0)
