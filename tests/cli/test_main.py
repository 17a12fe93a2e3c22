"""The commands, as a shell runs them."""

import gzip
import inspect
import json
import re
import subprocess
import sys

import pytest
from front_records import records
from tiny import tiny_adapter, tiny_classifier, tiny_llama

import rsoups
from rsoups.cli.main import COMMANDS, RECIPES, main
from rsoups.rewards.load import cards


def test_interpolate_writes_a_soup(tmp_path, capsys):
    folders = [str(tiny_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    assert main(["interpolate", *folders, "--lambdas", "0.3", "0.7", "--out", str(tmp_path / "soup")]) == 0
    assert json.loads((tmp_path / "soup" / "soup.json").read_text())["method"] == "exact"
    assert str(tmp_path / "soup") in capsys.readouterr().out
    out = str(tmp_path / "svd")
    assert main(["interpolate", *folders, "--method", "svd", "--rank", "2", "--out", out]) == 0
    assert json.loads((tmp_path / "svd" / "adapter_config.json").read_text())["r"] == 2


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "rsoups.cli", "interpolate", str(tmp_path), "--out", str(tmp_path / "soup")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("rsoups: ")]
    assert "adapter_config.json" in line and "Traceback" not in run.stderr
    assert not (tmp_path / "soup").exists()


def test_inspect_tells_what_can_be_souped(tmp_path, capsys):
    a, b = (str(tiny_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    other = str(tiny_adapter(tmp_path / "c", r=2))
    assert main(["inspect", a, b, other]) == 0
    shown = capsys.readouterr().out
    assert "rank     4 (4 modules); alpha 8" in shown and "q_proj x2, v_proj x2" in shown
    assert "different initializations" in shown and "method exact: yes" in shown
    assert "method factors: no: method 'factors' needs one rank" in shown
    assert main(["inspect", a]) == 0
    assert "method" not in capsys.readouterr().out


def test_the_base_gives_what_an_ingredient_lacks(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    head, plain = (
        str(tiny_adapter(tmp_path / "head", modules_to_save=["lm_head"])),
        str(tiny_adapter(tmp_path / "plain", seed=1)),
    )
    out, base = ["--out", str(tmp_path / "soup")], ["--base", str(tmp_path / "base")]
    assert main(["interpolate", head, plain, *out]) == 2
    assert "pass --base" in capsys.readouterr().err
    assert main(["inspect", head, plain]) == 0
    assert "method exact: no" in capsys.readouterr().out
    assert main(["inspect", head, plain, *base]) == 0
    assert "method exact: yes" in capsys.readouterr().out
    assert main(["interpolate", head, plain, "--lambdas", "0.9", "0.4", "--extrapolate", *out, *base]) == 0
    lineage = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [ingredient["lambda"] for ingredient in lineage["ingredients"]] == [0.9, 0.4]


def test_merge_writes_a_model(tmp_path, capsys):
    adapter = str(tiny_adapter(tmp_path / "a"))
    assert main(["merge", adapter, "--out", str(tmp_path / "model")]) == 2
    assert "does not name its base: pass --base" in capsys.readouterr().err
    tiny_llama().save_pretrained(tmp_path / "base")
    command = [
        "merge",
        adapter,
        "--base",
        str(tmp_path / "base"),
        "--dtype",
        "bfloat16",
        "--out",
        str(tmp_path / "model"),
    ]
    assert main(command) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rewards_are_listed(capsys):
    assert main(["rewards"]) == 0
    shown = capsys.readouterr().out
    assert "bart-faithful" in shown and "reversed_pair" in shown and "logit 1 - logit 0" in shown
    assert "judge-relevance" in shown and "http://127.0.0.1:8000/v1" in shown and "judged from 1 to 5" in shown
    assert "rouge-l-recall       rouge_l(score='recall')" in shown
    assert len(shown.splitlines()) == len(cards())


def test_score_shows_what_the_model_reads(tmp_path, capsys, monkeypatch):
    folder = tiny_classifier(tmp_path / "model", "electra", labels=2)
    card = tmp_path / "card.yaml"
    card.write_text(f"name: r\nmodel: {folder}\nlogit: 1\nmean: 1\nstd: 2")
    prompt = "### Instruction: w1 ### Input: w2 w3 ### Response: "
    assert main(["score", "--reward", str(card), "--prompt", prompt, "--response", "w4"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["input"] == "<s> w2 w3 </s> w4 </s>" and lines["ids"] == "[1, 6, 7, 2, 8, 2]"
    logit = float(lines["logits"].split("LABEL_1 ")[1])
    assert float(lines["score"]) == pytest.approx((logit - 1) / 2, abs=1e-5)
    (tmp_path / "mine.py").write_text("def words(prompts, responses): return [len(r.split()) for r in responses]")
    monkeypatch.chdir(tmp_path)
    assert main(["score", "--reward", "mine:words", "--prompt", "p", "--response", "a b c"]) == 0
    assert capsys.readouterr().out == "score   3\n"


def test_score_compares_with_references(tmp_path, capsys):
    said = ["score", "--prompt", "p", "--response", "A dog runs"]
    assert main([*said, "--reward", "rouge-l-recall", "--reference", "the cat", "a dog sleeps there"]) == 0
    assert capsys.readouterr().out == "score   0.5\n"
    assert main([*said, "--reward", "rouge-l-recall"]) == 2
    assert "pass --reference TEXT" in capsys.readouterr().err
    card = tmp_path / "scaled.yaml"
    card.write_text("name: r\nfunction: length\narguments: {target: 4}\nmean: -1\nstd: 2\nsign: -1")
    assert main([*said, "--reward", str(card)]) == 0
    assert capsys.readouterr().out == "raw     -0.25\nscore   0.625\n"


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert "argilla/news-summary" in shown and "40,000 rows of train" in shown and "custom" in shown


def test_preview_shows_prompts_and_what_a_reward_sees(tmp_path, capsys):
    rows = [{"chosen": f"\n\nHuman: What is number {i}?\n\nAssistant: It is {i}."} for i in range(7)] + [
        {"chosen": "x"}
    ] * 2
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    command = [
        "preview",
        "--task",
        "assistant",
        "--dataset",
        str(tmp_path / "rows.jsonl.gz"),
        "--reward",
        "naturalness",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("7 of the first 9 rows kept, 2 dropped")
    assert shown.count(" tokens] ### Instruction: What is number") == 5 and shown.count("and scores it") == 5
    assert "reference: It is 0." in shown and "▁number ▁ 0" in shown.split("naturalness reads:")[1]
    assert main(["preview", "--task", "nothing"]) == 2
    assert "'custom'" in capsys.readouterr().err


def test_probe_says_what_a_reward_pays_for(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def words(prompts, responses): return [len(r.split()) for r in responses]")
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"p{i % 5}", "response": "w " * (i + 1)}) for i in range(20)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    command = [
        "probe",
        "mine:words",
        "naturalness",
        "--records",
        "records.jsonl",
        "--rows",
        "12",
        "--out",
        "probe.json",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "12 responses" in shown and "strongly prefers longer responses: rho = 1.00" in shown and "agreement" in shown
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["findings"]["words"][0]["rho"]["value"] == pytest.approx(1)
    assert set(found["findings"]) == {"words", "naturalness"}
    assert main(["probe", "naturalness", "--records", "nothing.jsonl"]) == 2
    assert "no records file nothing.jsonl" in capsys.readouterr().err
    for wrong, words in (
        (["naturalness", "--task", "nothing"], "'custom'"),
        (["naturalness", "naturalness"], "2 rewards with 1 names"),
        (["naturalness", "--rows", "0"], "a probe of 0 responses"),
        (["naturalness", "--model", "no/model"], "cannot load 'no/model'"),
        (
            ["mine:words", "--records", "records.jsonl", "--out", "no/such/probe.json"],
            "cannot write no/such/probe.json",
        ),
    ):
        assert main(["probe", *wrong]) == 2 and words in capsys.readouterr().err


def test_report_draws_from_records_alone(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(n=5)[0]))
    assert main(["report", str(path)]) == 0
    assert {"front.png", "report.html", "report.md"} <= {p.name for p in tmp_path.iterdir()}
    assert "| MORL |" in capsys.readouterr().out


def test_report_compares_fronts_above_a_reference(tmp_path, capsys):
    path, csv = tmp_path / "records.jsonl", tmp_path / "published.csv"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(n=5, bulge=0.1)[0]))
    csv.write_text("lambda_A,lambda_B,a,b\n1,0,1,0\n0,1,0,1\n")
    command = ["report", str(path), "--reference", "a=-4,b=-4", "--other", str(csv), f"again={path}", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "above the reference a -4, b -4 (every reward maximized)" in out and "Soups minus MORL" in out
    assert "Against published (no common prompts)" in out and "Against again (5 common prompts): 0.000" in out
    assert (tmp_path / "out" / "report.html").is_file()


def test_select_chooses_by_each_rule(tmp_path, capsys):
    path, votes = tmp_path / "records.jsonl", tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(n=5, noise=0.0)[0]))
    sides = [{"lambdas": {"A": x, "B": 1 - x}, "response": ""} for x in (0.0, 1.0)]
    votes.write_text(json.dumps({"prompt": "p", "a": sides[0], "b": sides[1], "choice": "b"}) + "\n")
    for rule, lambdas in (
        (["--preference", "a=.7", "b=.3"], "1 0"),
        (["--maximize", "a", "--subject-to", "b >= 0.2"], "0.75 0.25"),
        (["--maximize", "b", "--subject-to", "a>0.2", "b < .7"], "0.5 0.5"),
        (["--votes", str(votes)], "1 0"),
    ):
        assert main(["select", str(path), *rule]) == 0
        out = capsys.readouterr().out
        assert f"rsoups interpolate A B --lambdas {lambdas} --out soup" in out and "of the draws" in out
    (tmp_path / "ppo a").mkdir()
    (tmp_path / "records.settings.json").write_text(json.dumps({"adapters": {"A": "ppo a", "B": "user/b"}}))
    assert main(["select", str(path), "--knee"]) == 0
    assert f"rsoups interpolate '{tmp_path}/ppo a' user/b --lambdas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["select", "RECORDS"], "one rule"),
        (["select", "RECORDS", "--preference", "a"], "'a' is not REWARD=NUMBER"),
        (["select", "RECORDS", "--preference", "a=b"], "'a=b' is not REWARD=NUMBER"),
        (["select", "RECORDS", "--maximize", "a", "--subject-to", "b"], "invalid limit 'b'"),
        (["select", "RECORDS", "--maximize", "a", "--subject-to", "b >= 9"], "the best reachable is 1 (λ 0 / 1)"),
        (["select", "RECORDS", "--votes", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["report", "RECORDS", "--reference", "a=1"], "finite reference for each of ['a', 'b']"),
        (["report", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ],
)
def test_choices_and_reports_that_cannot_be_made(tmp_path, capsys, arguments, words):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(n=3, noise=0.0)[0]))
    assert main([str(path) if word == "RECORDS" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize("command", [[], *([function.__name__] for group in COMMANDS.values() for function in group)])
def test_help_shows_an_example_and_every_option_with_its_meaning(command, capsys):
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: rsoups" in shown
    if command:
        assert "Example: rsoups " + command[0] in shown
        function = next(f for group in COMMANDS.values() for f in group if f.__name__ == command[0])
        described = re.findall(r"^        (\w+): ", function.__doc__, re.MULTILINE)
        assert described == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("command", sorted(RECIPES))
def test_recipes_are_commands_too(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out
    main(["--help"])
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolat"], 'Did you mean "interpolate"?'),
        (["interpolate", "a", "--lambda", "1"], "Did you mean --lambdas?"),
        (["interpolate", "a"], "--out"),
        (["interpolate", "a", "--out", "b", "--method", "slerp"], '"exact"'),
        (["interpolate", "a", "--out", "b", "--lambdas", "x"], "float"),
        (["explore", "--port", "x"], "int"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "--help" in error


def test_both_spellings_of_a_flag_are_taken_and_negative_weights(tmp_path, capsys):
    folders = [str(tiny_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    weights = ["--lambdas", "1.5", "-0.5"]
    assert main(["interpolate", *folders, *weights, "--allow_base_mismatch", "--out", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert "--extrapolate" in error and "extrapolate=True" not in error
    named = [f"x={folders[0]}", f"y={folders[1]}"]
    assert main(["interpolate", "--adapters", *named, *weights, "--extrapolate", f"--out={tmp_path / 's'}"]) == 0
    manifest = json.loads((tmp_path / "s" / "soup.json").read_text())
    assert [(i["name"], i["lambda"]) for i in manifest["ingredients"]] == [("x", 1.5), ("y", -0.5)]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert rsoups.__version__ in capsys.readouterr().out
