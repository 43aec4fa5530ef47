"""`labs bench TARGET`: every target has a module with its own help, and importing them all loads no torch."""

import pytest

from labs_lib import bench, cli

from .test_imports import loaded_after


@pytest.mark.parametrize("target", bench.TARGETS)
def test_every_target_has_its_own_help(target, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", target, "--help"])
    assert exit_.value.code == 0
    assert f"usage: labs bench {target}" in capsys.readouterr().out


def test_a_target_runs_with_its_own_options(monkeypatch):
    class Trial:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--n", type=int)

        @staticmethod
        def main(args):
            return args.n

    monkeypatch.setattr(bench, "TARGETS", {"trial": ("trial_bench", "a trial")})
    monkeypatch.setattr(bench, "import_module", lambda name: Trial)
    assert cli.main(["bench", "trial", "--n", "7"]) == 7


def test_no_target_or_an_unknown_one_is_told(capsys):
    for words in ([], ["speed"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *words])
        assert exit_.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_listing_the_targets_loads_no_torch():
    code = "from labs_lib.cli import main\ntry:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass"
    assert "torch" not in loaded_after(code)
