"""An exercise's source and stub: they run where the module is not, and the stub gives nothing away."""

import textwrap

import pytest

from labs_lib.build import inline
from labs_lib.errors import LabsError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(text): a parsed module of that text."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str, name: str = "inlined_here") -> inline.Module:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return inline.Module(name)

    return make


STEPS = '"""Does. Steps: 1. Do it."""'


def test_function_stub_keeps_signature_and_docstring_only():
    mean = inline.module("fixture_methods").inline("mean")
    assert mean.stub.splitlines()[0] == "def mean(x: Numbers, scale: float = HALF) -> Numbers:"
    assert "2. Divide by their number; scale." in mean.stub
    assert mean.stub.endswith('    raise NotImplementedError("TODO: mean")')
    assert "comment" not in mean.stub and "math" not in mean.stub
    assert mean.solution.endswith("return _total(x) / math.prod(x.shape) * scale")


def test_imports_are_what_the_code_uses_and_no_more():
    lines = inline.import_lines(inline.module("fixture_methods").inline("mean").imports)
    assert lines == [
        "import math",
        "from torch import Tensor as Numbers",
        "from fixture_methods import HALF, _total",
    ]


def test_class_stub_keeps_attributes_and_marked_methods():
    scaler = inline.module("fixture_methods").inline("Scaler")
    assert 'kind = "scaler"' in scaler.stub
    assert "self.factor = factor" in scaler.stub
    assert "# keep" not in scaler.stub + scaler.solution
    assert '        raise NotImplementedError("TODO: Scaler.forward")' in scaler.stub
    assert "    @property\n    def back(self) -> float:\n        raise NotImplementedError" in scaler.stub
    assert "1 / self.factor" not in scaler.stub and "1 / self.factor" in scaler.solution


def test_solution_and_stub_run_on_their_own():
    for text in ("solution", "stub"):
        namespace: dict = {}
        for name in ("mean", "Scaler"):
            made = inline.module("fixture_methods").inline(name)
            imports = [need for need in made.imports if need.name not in namespace]
            exec("\n".join([*inline.import_lines(imports), getattr(made, text)]), namespace)
        import torch

        if text == "solution":
            assert namespace["Scaler"](2.0)(torch.tensor([1.0, 3.0])).tolist() == [-2.0, 2.0]
        else:
            with pytest.raises(NotImplementedError, match=r"TODO: Scaler\.forward"):
                namespace["Scaler"](2.0)(torch.ones(1))


def test_decorators_one_liners_and_several_line_signatures(module):
    made = module(f"""
        import functools as ft

        @ft.lru_cache(
            maxsize=None)
        def long(
            a: int,
            b: int = 2,  # a comment
        ) -> int:
            {STEPS}
            # the trick
            return a * b

        class Box:
            {STEPS}

            # how it works
            def get(self): return 41
        """)
    long, box = made.inline("long"), made.inline("Box")
    assert long.stub.startswith("@ft.lru_cache(\n    maxsize=None)\ndef long(\n    a: int,")
    assert "trick" not in long.stub
    assert inline.import_lines(long.imports) == ["import functools as ft"]
    assert box.stub.endswith('    def get(self):\n        raise NotImplementedError("TODO: Box.get")')
    assert "41" not in box.stub and "how it works" not in box.stub
    for each in (long, box):
        compile(each.stub, "stub", "exec")


def test_relative_and_future_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_package" / "sub"
    package.mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").write_text(
        "raise RuntimeError('a build imports no course module')"
    )
    (package / "__init__.py").write_text("")
    (package / "here.py").write_text(
        "from __future__ import annotations\nfrom . import near\nfrom ..far import thing as t\n\n\n"
        f"class Node:\n    {STEPS}\n\n    def next(self) -> Node:\n        return near.x or t\n"
    )
    node = inline.Module("some_package.sub.here").inline("Node")
    assert inline.import_lines(node.imports) == [
        "from __future__ import annotations",
        "from some_package.sub import near",
        "from some_package.far import thing as t",
    ]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("x = 1", "f", "defines no function or class 'f'"),
        ("def f():\n    return 1", "f", "Steps:"),
        ('def f():\n    """No steps."""', "f", "Steps:"),
        (
            f"class C:\n    {STEPS}\n\n    def m(self):  # keep\n        return 1",
            "C",
            "leaves nothing to write",
        ),
    ],
)
def test_what_cannot_be_an_exercise(module, text, name, says):
    with pytest.raises(LabsError, match=says):
        module(text).inline(name)


def test_a_module_that_is_not_there():
    for name in ("labs_lib.methods.no_such", "no_such_package.x"):
        with pytest.raises(LabsError, match="there is no module"):
            inline.module(name)
