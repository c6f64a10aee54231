import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sam_jax.errors import EXTRAS, MissingExtra, clip, listed, needs_extra

PACKAGES = [(extra, package) for extra, packages in EXTRAS.items() for package in packages]


def test_long_names_are_cut_in_the_middle():
    assert clip("a" * 200) == "a" * 200
    assert clip("a" * 10**6 + "b" * 90) == "a" * 90 + "..." + "b" * 90


@pytest.mark.parametrize(("extra", "package"), PACKAGES)
def test_a_missing_package_names_its_extra(monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as found, needs_extra(extra):
        importlib.import_module(f"{package}.some.module")
    command = f'run: pip install "sam_jax[{extra}]"'
    assert str(found.value) == f"{package} is not installed; {command}"
    assert found.value.name == package


def test_another_missing_module_is_not_an_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs_extra("onnx"):
        import no_such_module  # noqa: F401


def test_extras_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        names = {Requirement(text).name for text in project["optional-dependencies"][extra]}
        assert names <= set(packages)


def test_ten_names_are_listed_and_the_rest_counted():
    names = [f"layer_{i}" for i in range(12)]
    assert listed(names[:10]) == ", ".join(names[:10])
    assert listed(names) == ", ".join(names[:10]) + " and 2 more"
