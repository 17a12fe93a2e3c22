"""The commands, as a shell runs them."""

import gzip
import json
import subprocess
import sys

import pytest
from test_front import records
from tiny import tiny_adapter, tiny_classifier, tiny_llama

import rsoups
from rsoups.cli import main
from rsoups.scoring import cards


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
    assert "different initialisations" in shown and "method exact: yes" in shown
    assert "method factors: no: method 'factors' needs one rank" in shown
    assert main(["inspect", a]) == 0
    assert "method" not in capsys.readouterr().out


def test_merge_writes_a_model(tmp_path, capsys):
    adapter = str(tiny_adapter(tmp_path / "a"))
    assert main(["merge", adapter, "--out", str(tmp_path / "model")]) == 2
    assert "does not name its base: say --base" in capsys.readouterr().err
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
    assert "rouge-l-recall       text_metrics:rouge_l(score='recall')" in shown
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
    assert "say --reference TEXT" in capsys.readouterr().err
    card = tmp_path / "scaled.yaml"
    card.write_text("name: r\nfunction: rsoups.text_checks:length\narguments: {target: 4}\nmean: -1\nstd: 2\nsign: -1")
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


def test_report_draws_from_records_alone(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(n=5)[0]))
    assert main(["report", str(path)]) == 0
    assert {"front.png", "report.html", "report.md"} <= {p.name for p in tmp_path.iterdir()}
    assert "| MORL |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["interpolate"],
        ["inspect"],
        ["merge"],
        ["rewards"],
        ["score"],
        ["tasks"],
        ["preview"],
        ["report"],
        ["sweep"],
        ["demo"],
    ],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert rsoups.__version__ in capsys.readouterr().out
