"""What commands say: nothing but failures when quiet, more when verbose; what a shell completes."""

import json
import os
import subprocess
import sys

import pytest
from test_precompute import TunableToy
from toy_corrector import run_cli, save_toy_corrector
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.pipeline import config
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute

SMALL = [
    "photo.size=64", "run.unit_size=2", "ladder.regions=3", "network.size=tiny", "train.steps=2",
    "train.size=32", "train.crop=32", "train.log_every=1", "train.good=0", "train.scenes=0",
    "judge.steps=2", "prompts.epochs=1",
]  # fmt: skip


def toys(settings=None) -> Models:
    return Models(ToySegmenter(), ToyClip())


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Arguments of each command with work, on toy models: photos, a store, a set, a corrector."""
    for module in ("precompute", "load", "train"):
        monkeypatch.setattr(f"evenlight.pipeline.{module}.load_models", toys)
    monkeypatch.setattr("evenlight.pipeline.judge.load_clip", lambda *_: TunableToy())
    write_photos(tmp_path / "photos", 4)
    settings = config.build(overrides=SMALL)
    precompute(tmp_path / "photos", tmp_path / "S", settings=settings, models=toys())
    given = [part for text in SMALL for part in ("--set", text)]
    store, changed = ("-s", tmp_path / "S"), ("--set", "pseudo_gt.max_strength=1.5")
    model = save_toy_corrector(tmp_path / "model")
    return {
        "precompute": ["precompute", tmp_path / "photos", *store, *changed],
        "tune-clip": ["tune-clip", *store, *given],
        "regenerate": ["regenerate", *store, *changed],
        "train": ["train", *store, "-o", tmp_path / "run", *given],
        "evaluate": ["evaluate", "--data", f"good:{tmp_path / 'photos'}"],
        "correct": ["correct", tmp_path / "photos", "-o", tmp_path / "out", "-m", model],
        "report": ["report", tmp_path / "S", "-o", tmp_path / "page.html"],
    }


@pytest.mark.parametrize(
    ("command", "said", "more"),
    [
        ("precompute", "4 photos, 0 failed; units: 2 made", "unit 1: pseudo_gt (pseudo_gt: "),
        ("tune-clip", "now decides: the judge ", "'teachers': "),
        ("regenerate", "4 photos, 0 failed; units: 2 made", "unit 1: pseudo_gt (judge or "),
        ("train", ": 2 steps, ", "step 2: loss "),
        ("evaluate", "", "photo_000.png: film rule: PSNR "),
        ("correct", "corrected 4 photos: ", "  kept: photo_003.png: the whole file"),
        ("report", "4 photos; look at ", "photo_000.png: "),
    ],
)
def test_q_v_and_neither_mean_the_same_everywhere(
    command, said, more, commands, monkeypatch, capsys
):
    arguments = commands[command]
    if command == "correct":
        arguments.append("--overwrite")
    loud = "pseudo_gt.max_strength 2.2 -> 1.5: what that touches is made anew in 2 units\n"
    for option, expected in (("-v", [said, more]), (None, [said]), ("--quiet", [])):
        if command in ("precompute", "regenerate"):  # else all is there already
            restore = ["regenerate", *arguments[arguments.index("-s") :][:2]]
            assert run_cli(monkeypatch, *restore, "--set", "pseudo_gt.max_strength=2.2") == 0
            capsys.readouterr()
        if command == "train" and option:
            arguments[4] = arguments[4].with_name(f"run{option}")
        options = [option] if option else []
        assert run_cli(monkeypatch, *arguments, *options) == 0
        found = capsys.readouterr().err
        assert all(words in found for words in expected), found
        assert (more in found) == (option == "-v")
        if option == "--quiet":
            assert found in ("", loud)


def test_a_quiet_command_still_names_what_failed(commands, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos/page.jpg").write_text("<html>")
    (tmp_path / "photos/raw.dng").touch()
    assert run_cli(monkeypatch, *commands["precompute"], "-q", "--json") == 1
    said = capsys.readouterr()
    assert "1 failed:\n  page.jpg: " in said.err and "raw.dng" not in said.err
    assert [name for name, _ in json.loads(said.out)["passed_over"]] == ["raw.dng"]


def completed(words: str) -> str:
    """What `evenlight` tells a zsh that completes these words."""
    code = (
        "import sys; sys.argv = ['evenlight']\n"
        "from evenlight.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'zarr' not in sys.modules"
    )
    asked = {"_EVENLIGHT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("words", "offered", "others"),
    [
        ("evenlight tr", ["train"], ["precompute"]),
        ("evenlight cache v", ["verify"], ["info"]),
        ("evenlight correct --ov", ["--overwrite"], ["--strength"]),
        ("evenlight train --set train.s", ["train.steps=", "train.size="], ["photo.size="]),
        ("evenlight train --set network.head=", ["network.head=tone"], ["network.size"]),
        ("evenlight correct ", ["_files"], []),
    ],
)
def test_a_shell_completes_commands_options_and_settings_without_torch(words, offered, others):
    found = completed(words)
    assert all(word in found for word in offered), found
    assert not any(word in found for word in others), found


def test_completion_can_be_shown_and_installed(tmp_path):
    command = [sys.executable, "-c", "import evenlight.cli; evenlight.cli.main()"]
    environment = os.environ | {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(
        [*command, "--show-completion", "bash"], env=environment, capture_output=True, text=True
    )
    assert "complete -o default" in done.stdout and done.returncode == 0, done.stderr
