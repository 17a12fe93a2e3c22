"""A sweep through a server, against a stand-in on loopback that speaks vLLM's API."""

import json

import pytest
from sweep_runs import GRID, PROMPTS, REWARDS, WORDS, run, same
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from vllm_stand_in import stand_in

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.generation import vllm_client
from rsoups.generation.decoding import seed_of
from rsoups.sweeps.records import Records

TOKENIZER = tiny_tokenizer(WORDS)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)
    monkeypatch.setattr(vllm_client, "_POLL", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("VLLM_API_KEY", "ours")
    with stand_in(tiny_llama, TOKENIZER) as server:
        yield server


def both(two, tmp_path, server, **settings):
    """Records of a sweep here, and of the same through the server."""
    settings = {"temperature": 0, "others": {"MORL": two["b"]}, "seed": 4} | settings
    run(two, tmp_path / "local.jsonl", **settings)
    (tmp_path / "out").mkdir()
    run(two, tmp_path / "out" / "records.jsonl", server=server.url, **settings)
    return read_jsonl(tmp_path / "local.jsonl"), read_jsonl(tmp_path / "out" / "records.jsonl")


def test_records_are_those_of_a_sweep_without_it(two, tmp_path, server):
    server.busy = 2
    local, records = both(two, tmp_path, server)
    assert same(records, local) and any(abs(record["kl"]) > 0.1 for record in local)
    assert server.loaded == {} and {path.name for path in (tmp_path / "out").iterdir()} == {
        "records.jsonl",
        "records.settings.json",
    }
    assert "base_weights" not in json.loads((tmp_path / "out" / "records.settings.json").read_text())
    assert server.keys == {"Bearer ours"}
    made = [data for data in server.asked if data["max_tokens"] == 6]
    assert len(made) == 5 * 4 + 2, "the two that failed were asked again"
    for data in made:
        assert (data["temperature"], data["top_p"], data["top_k"], data["min_p"]) == (0, 1.0, -1, 0)
        assert data["seed"] == seed_of(4, TOKENIZER.decode(data["prompt"]), 0) % 2**31


def test_kl_is_told_at_temperature_1_and_left_out_at_others(two, tmp_path, server):
    run(two, tmp_path / "1.jsonl", server=server.url, samples=2)
    nats = [(r["name"], r["kl"], r["base_nll"]) for r in read_jsonl(tmp_path / "1.jsonl")]
    assert len(nats) == 4 * 4 * 2 and all(kl == 0 for name, kl, _ in nats if name == "base")
    assert sum(kl for name, kl, _ in nats if name == "soup") > 1 and all(nll > 0 for *_, nll in nats)

    run(two, tmp_path / "hot.jsonl", server=server.url, temperature=1.5)
    records = read_jsonl(tmp_path / "hot.jsonl")
    assert all(("kl" in r) == (r["name"] == "base") and r["base_nll"] > 0 for r in records)


def test_a_server_without_token_ids_leaves_nats_out(two, tmp_path, server, caplog):
    server.hides = ("token_ids",)
    local, records = both(two, tmp_path, server)
    assert records == [{k: v for k, v in r.items() if k not in ("kl", "base_nll")} for r in local]
    assert "tells no token ids" in caplog.text


def test_adapters_of_any_ranks_and_scalings_are_served_exactly(tmp_path, server):
    patterns = {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}}
    tiny_adapter(tmp_path / "a", r=3, use_rslora=True)
    tiny_adapter(tmp_path / "b", seed=1, r=5, **patterns)
    two = {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert same(*both(two, tmp_path, server, others={"B": two["b"]}))


@pytest.mark.parametrize("restarts_at", [[3], [7], [5, 9, 23]])
def test_a_restart_in_the_middle_changes_no_record(two, tmp_path, server, restarts_at):
    server.restarts_at = restarts_at
    local, records = both(two, tmp_path, server)
    assert same(records, local)


def test_a_server_that_is_away_for_a_while_is_waited_for(two, tmp_path, server, monkeypatch, caplog):
    append = Records.append

    def goes_away(self, records):
        append(self, records)
        if server.asked:
            server.loaded.clear()
            server.down = 40  # the client's own tries are not enough

    monkeypatch.setattr(Records, "append", goes_away)
    local, records = both(two, tmp_path, server)
    assert same(records, local) and "waiting for it up to 15 minutes" in caplog.text


def test_a_server_that_stays_away_ends_the_sweep_and_finished_records_stay(two, tmp_path, server, monkeypatch):
    append = Records.append

    def goes_away(self, records):
        append(self, records)
        server.down = 10**9

    monkeypatch.setattr(vllm_client, "_PATIENCE", 0.1)
    monkeypatch.setattr(Records, "append", goes_away)
    with pytest.raises(rsoups.ServerError, match="is not reached .*minutes; start it and run again"):
        run(two, tmp_path / "r.jsonl", server=server.url)
    kept = read_jsonl(tmp_path / "r.jsonl")
    assert kept and not list(tmp_path.glob(".soups-*"))

    monkeypatch.setattr(Records, "append", append)
    server.down = 0
    run(two, tmp_path / "r.jsonl", server=server.url)
    assert len(read_jsonl(tmp_path / "r.jsonl")) == 4 * 4


def test_a_server_that_comes_back_with_another_base_is_refused(two, tmp_path, server):
    def other_base(prompts, responses):
        server.base = "other"
        return [0.0 for _ in responses]

    with pytest.raises(rsoups.ServerError, match="serves 'other' now, no longer 'tiny'"):
        run(two, tmp_path / "r.jsonl", {"other": other_base}, server=server.url)


def test_what_a_server_refuses_is_told_before_any_work(two, tmp_path, server):
    server.max_rank = 4
    with pytest.raises(rsoups.ServerError, match="no LoRA of rank 8: serve with --max-lora-rank 8.* method svd"):
        run(two, tmp_path / "r.jsonl", server=server.url)
    server.max_rank, server.runtime = 64, False
    with pytest.raises(rsoups.ServerError, match="answers 404 to /v1/load_lora_adapter.*RUNTIME_LORA_UPDATING=1"):
        run(two, tmp_path / "r.jsonl", server=server.url)
    assert not server.asked and not read_jsonl(tmp_path / "r.jsonl") and not list(tmp_path.glob(".soups-*"))

    with pytest.raises(rsoups.ServerError, match="is not reached"):
        run(two, tmp_path / "none.jsonl", server="http://127.0.0.1:1")
    with pytest.raises(rsoups.SettingsError, match="no prediction ensembles"):
        run(two, tmp_path / "e.jsonl", REWARDS, lambdas=GRID[:1], server=server.url, ensemble=True)
    saved = tiny_adapter(tmp_path / "saved", modules_to_save=["norm"])
    with pytest.raises(rsoups.AdapterError, match="trained beside them: serve a whole model"):
        run({"saved": saved}, tmp_path / "s.jsonl", lambdas=[[1]], server=server.url)


def test_a_rank_that_no_server_takes_is_refused_and_svd_is_small_enough(tmp_path, server):
    shape = {"vocab_size": 64, "hidden_size": 400, "intermediate_size": 400, "num_attention_heads": 4}
    base = tiny_llama(**shape, num_hidden_layers=1)
    two = {}
    for seed, name in enumerate("ab"):
        two[name] = tiny_adapter(tmp_path / name, tiny_llama(**shape, num_hidden_layers=1), seed=seed, r=300)
    server.base_model, server.max_rank = lambda: tiny_llama(**shape, num_hidden_layers=1), 320
    options = {"base": base, "server": server.url, "lambdas": [[0.5, 0.5]], "prompts": PROMPTS[:1]}
    with pytest.raises(rsoups.AdapterError, match="has rank 600, and vLLM takes 512 at most.*method svd"):
        run(two, tmp_path / "r.jsonl", **options)
    run(two, tmp_path / "s.jsonl", **options, method="svd")
    assert len(read_jsonl(tmp_path / "s.jsonl")) == 2
