"""The journal on the command line: runs that are killed and go on, and the commands that replay, verify, revert and compare."""

import os

import pytest

from lozo_kernels.cli import command as cli
from lozo_kernels.journal import read_journal
from python_tests.finetune_helpers import meaning, model_of
from python_tests.processes import forked

pytest.importorskip("transformers")


def _finetune(folder, *more):
    arguments = ["--steps", "30", "--interval", "7", "--eval-every", "8", "--compare-steps", "0", "--eval-size", "12"]
    return cli.main(["finetune", *arguments, "--lr-schedule", "linear", "--output", str(folder), "--quiet", *more])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed that were forked")
@pytest.mark.parametrize("options", [("--method", "lozo-m"), ("--placement", "probe", "--dtype", "bfloat16")], ids="-".join)
def test_finetune_goes_on_after_a_kill(tmp_path, rng, capsys, options):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert _finetune(calm, *options) == 0
    step = rng.randrange(2, 29)
    log = killed / "metrics.jsonl"
    assert not forked(
        lambda: _finetune(killed, *options),
        lambda: log.exists() and log.read_text().count('"kind": "step"') > step,
    )
    assert read_journal(killed / "run.journal").steps > 0
    with log.open("a") as file:
        file.write('{"kind": "step", "st')  # as a kill within a line leaves it
    assert cli.main(["finetune", "--resume", str(killed), "--quiet"]) == 0
    assert meaning(killed) == meaning(calm)
    assert model_of(killed) == model_of(calm)
    capsys.readouterr()
    assert cli.main(["diff", str(calm), str(killed)]) == 0
    assert capsys.readouterr().out == "the journals are equal\n"


def test_commands(tmp_path, rng, capsys):
    run, again, back = tmp_path / "run", tmp_path / "again", tmp_path / "back"
    assert _finetune(run) == 0
    capsys.readouterr()
    assert cli.main(["replay", "--journal", str(run), "--output", str(again)]) == 0
    assert "30 steps (0 without an update)" in capsys.readouterr().out
    assert model_of(again) == model_of(run)
    assert cli.main(["verify", "--journal", str(run), "--checkpoint", str(again)]) == 0
    assert capsys.readouterr().out.startswith("good: 30 steps replayed")
    assert cli.main(["revert", "--journal", str(run), "--step", "11", "--output", str(back)]) == 0
    assert read_journal(back / "run.journal").steps == 11
    capsys.readouterr()
    assert cli.main(["verify", "--journal", str(run), "--checkpoint", str(back)]) == 1
    assert capsys.readouterr().out.startswith("bad: after 30 steps")
    assert cli.main(["verify", "--journal", str(run), "--checkpoint", str(back), "--step", "11"]) == 0
    assert capsys.readouterr().out.startswith("good: 11 steps replayed")
    assert cli.main(["verify", "--journal", str(back)]) == 1
    assert capsys.readouterr().out.startswith("nothing to compare with")
    assert cli.main(["diff", str(run), str(back)]) == 1
    assert "differs in record" in capsys.readouterr().out

    def fails(message, *arguments):
        assert cli.main(list(arguments)) == 2
        assert message in capsys.readouterr().err

    fails("--step 31: ", "replay", "--journal", str(run), "--step", "31", "--output", str(again))
    fails(
        "starts from other weights",
        "replay",
        "--journal",
        str(run),
        "--model",
        str(run / "model"),
        "--output",
        str(tmp_path / "other"),
    )
    fails("cannot read the journal", "verify", "--journal", str(tmp_path / "none"))
    fails("there is no run.journal", "finetune", "--resume", str(tmp_path / "none"))
    fails("takes all settings from the run", "finetune", "--resume", str(run), "--lr", "1")
    fails("has taken all of its 30 steps", "finetune", "--resume", str(run))
    damaged = bytearray((run / "run.journal").read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (run / "run.journal").write_bytes(damaged)
    fails("is damaged", "finetune", "--resume", str(run))
