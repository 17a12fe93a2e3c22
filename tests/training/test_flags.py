"""Command lines of the recipes: spellings, what is refused, and the help that a user reads."""

import dataclasses
import runpy
import sys

import pytest
from places import RECIPES, ROOT
from trl import ModelConfig, RewardConfig, SFTConfig

import rsoups
from rsoups.cli.main import RECIPES as COMMANDS
from rsoups.cli.main import main
from rsoups.common.errors import SHORT_NAMES, one_line, shown_flag
from rsoups.training.configs import given_flags, spelled_out
from rsoups.training.flags import FlagParser, read_config
from rsoups.training.run_arguments import RunArguments, parse

TRAINED = [name for name in COMMANDS if name != "demo"]


def fields_of(*classes):
    return {field.name for kind in classes for field in dataclasses.fields(kind) if field.init}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--learning-rate 1e-4 --bf16=false", "--learning_rate 1e-4 --bf16=false"),
        ("--base user/base --out runs/x", "--model_name_or_path user/base --output_dir runs/x"),
        ("--base=user/a-b --out=a=b", "--model_name_or_path=user/a-b --output_dir=a=b"),
        ("--reward a-b --reward-weights -0.5 .5", "--reward a-b --reward_weights -0.5 .5"),
        ("-h x --", "-h x --"),
    ],
)
def test_flags_have_one_meaning_in_every_spelling(written, meant):
    assert spelled_out(written.split()) == meant.split()
    assert parse([])[1].learning_rate == parse(["--config=embedded"])[1].learning_rate


def test_values_of_flags_are_found_however_they_are_written():
    assert given_flags(["--a", "1", "2", "--b=x=y", "--c", "--d", "-.5", "--e"]) == {
        "a": "1", "b": "x=y", "c": None, "d": "-.5", "e": None,
    }  # fmt: skip
    assert given_flags([]) == {} and given_flags(["a", "--b"]) == {"b": None}


@pytest.mark.parametrize("flags", [["--base", "mine"], ["--base=mine"], ["--model-name-or-path=mine"]])
def test_a_base_of_ones_own_does_not_get_the_embedded_settings(flags):
    _, training, model = parse(flags)
    assert (model.model_name_or_path, training.learning_rate) == ("mine", 3e-4)


@pytest.mark.parametrize("flags", [["--algorithm", "rloo"], ["--algorithm=rloo"]])
def test_the_algorithm_decides_the_settings(flags):
    assert type(parse(["--base", "mine", *flags])[1]).__name__ == "RLOOConfig"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rewrd x", "no flag --rewrd. Did you mean '--reward'?"),
        ("--learnin_rate=1", "no flag --learnin-rate. Did you mean '--learning-rate'?"),
        ("--output x", "no flag --output. Did you mean '--out'?"),
        ("--task nws", "--task is 'nws', must be one of assistant, concepts, film, news,"),
        ("--task nws", "Did you mean 'news'?"),
        ("--algorithm=grop", "must be one of grpo, ppo, rloo. Did you mean 'grpo'?"),
        ("--learning-rate x", "--learning-rate: invalid float value: 'x'"),
        ("naturalness coverage", "no flag takes 'naturalness' 'coverage'"),
        ("--config", "--config needs one file"),
        ("--config embedded --config embedded", "--config needs one file"),
        ("--config embeded", "one of those that ship: embedded, "),
        ("--config embeded", "Did you mean 'embedded'?"),
        ("--load-in-8bit --load-in-4bit", "8 bit and 4 bit"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_hint(flags, words):
    with pytest.raises(rsoups.SettingsError) as refusal:
        parse(flags.split())
    assert words in str(refusal.value) and "\n" not in one_line(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1.0", "no setting 'learning_rat' of this recipe. Did you mean 'learning_rate'?"),
        ("- a", "is not a YAML mapping"),
        ("", "is not a YAML mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(rsoups.SettingsError) as refusal:
        parse(["--config", str(path)])
    assert words in str(refusal.value)
    with pytest.raises(rsoups.SettingsError, match=r"cannot read the config .*nowhere.yaml: No such file"):
        read_config(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("command", TRAINED)
def test_a_commands_help_is_of_that_command_and_fits_the_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: rsoups {command} [--config FILE] [FLAGS]\n")
    assert f"Example: rsoups {command} --" in shown and "(default: " in shown
    assert ".py" not in shown and "None" not in shown.split("further settings")[0].replace("`None`", "")
    assert max(map(len, shown.splitlines())) <= 80 and len(shown.splitlines()) < 300
    for name, short in SHORT_NAMES.items():
        assert f"--{short} STR" in shown and f"--{name}" not in shown and f"--{name.replace('_', '-')}" not in shown


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("sft", (SFTConfig, ModelConfig)), ("reward_model", (RewardConfig, ModelConfig)), ("sweep", ())],
)
def test_the_help_names_every_setting(recipe, settings, capsys):
    arguments = runpy.run_path(str(RECIPES / f"{recipe}.py"))["ScriptArguments"]
    parser = FlagParser((arguments, *settings), "What it does.", "--x")
    shown = parser.format_help()
    for name in fields_of(arguments, *settings):
        assert shown_flag(name) in shown, name
    for field in dataclasses.fields(arguments):
        assert " ".join(field.metadata["help"].split()) in " ".join(shown.split()), field.name


def test_the_help_tells_the_command_that_was_typed(monkeypatch, capsys):
    """A script, a module of the installed package, or a command of rsoups."""
    main_module = sys.modules["__main__"]
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py"])
    monkeypatch.setattr(main_module, "__spec__", None)
    assert FlagParser((RunArguments,), "", "").prog == "accelerate launch recipes/sft.py"
    monkeypatch.setattr(main_module, "__spec__", type("Spec", (), {"name": "rsoups.recipes.sft"}))
    assert FlagParser((RunArguments,), "", "").prog == "accelerate launch -m rsoups.recipes.sft"
    monkeypatch.setattr(main_module, "COMMAND", "rsoups sft", raising=False)
    assert FlagParser((RunArguments,), "", "").prog == "rsoups sft"


@pytest.mark.parametrize("command", TRAINED)
def test_an_error_of_a_recipe_is_one_line_and_exit_code_2(command, tmp_path, capsys):
    assert main([command, "--no-such-flag", str(ROOT)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert (
        captured.err.startswith("rsoups: no flag --no-such-flag.") and f"See: rsoups {command} --help" in captured.err
    )


def test_errors_use_the_words_of_the_command_line():
    error = rsoups.LambdasError("lambdas sum to 1.2:\n  pass normalize=True, or base= for the rest (x.y=True stays)")
    assert one_line(error) == "rsoups: lambdas sum to 1.2: pass --normalize, or --base for the rest (x.y=True stays)"
    error = rsoups.OutputError(
        "runs/a_b--c_d: another --output_dir, or --overwrite_output_dir true; --mini_batch_size=4"
    )
    words = "runs/a_b--c_d: another --out, or --overwrite-output-dir true; --mini-batch-size=4"
    assert one_line(error) == f"rsoups: {words}"
