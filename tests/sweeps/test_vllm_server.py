"""A sweep through a server, against a stand-in on loopback that speaks vLLM's API and holds the adapters that it is told of."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sweep_runs import GRID, PROMPTS, REWARDS, run
from tiny import tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.generation.decoding import seed_of

TOKENIZER = tiny_tokenizer([f"w{i}" for i in range(60)])


class StandIn(BaseHTTPRequestHandler):
    """Greedy responses of the tiny base with the adapter asked for. Its first two answers to completions fail."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        loaded = [{"id": name, "parent": "tiny"} for name in self.server.loaded]
        self.answer(200, {"data": [*loaded, {"id": "tiny", "parent": None}]})

    def do_POST(self):
        self.server.keys.add(self.headers["Authorization"])
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/v1/load_lora_adapter":
            folder = Path(data["lora_path"])
            if not (folder.is_absolute() and (folder / "adapter_model.safetensors").is_file()) or server.refuses:
                return self.answer(400, {"message": "No adapter found"})
            server.loaded[data["lora_name"]] = PeftModel.from_pretrained(tiny_llama(), folder).eval()
            return self.answer(200, {})
        if self.path == "/v1/unload_lora_adapter":
            del server.loaded[data["lora_name"]]
            return self.answer(200, {})
        with server.lock:
            server.asked.append(data)
            if len(server.asked) <= 2:
                return self.answer(503, {"message": "busy"})
            model = tiny_llama() if data["model"] == "tiny" else server.loaded[data["model"]]
            with torch.no_grad():
                ids = torch.tensor([data["prompt"]])
                said = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=data["max_tokens"],
                )[0, ids.shape[1] :]
        text = TOKENIZER.decode(said, skip_special_tokens=True)
        return self.answer(200, {"choices": [{"text": text}], "usage": {"completion_tokens": len(said)}})

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.loaded, server.asked, server.refuses, server.lock = {}, [], False, threading.Lock()
    server.keys = set()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("VLLM_API_KEY", "ours")
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_port}/"


def test_responses_are_those_of_a_sweep_without_it(two, tmp_path, server):
    settings = {"temperature": 0, "others": {"MORL": two["b"]}, "seed": 4}
    run(two, tmp_path / "local.jsonl", **settings)
    (tmp_path / "out").mkdir()
    run(two, tmp_path / "out" / "records.jsonl", server=url(server), **settings)
    local, records = read_jsonl(tmp_path / "local.jsonl"), read_jsonl(tmp_path / "out" / "records.jsonl")
    assert records == [{k: v for k, v in r.items() if k not in ("kl", "base_nll")} for r in local]
    assert server.loaded == {} and {path.name for path in (tmp_path / "out").iterdir()} == {
        "records.jsonl",
        "records.settings.json",
    }
    assert "base_weights" not in json.loads((tmp_path / "out" / "records.settings.json").read_text())
    assert len(server.asked) == 5 * 4 + 2, "the two that failed were asked again"
    assert server.keys == {"Bearer ours"}
    for data in server.asked:
        assert (data["temperature"], data["max_tokens"], data["top_p"], data["top_k"]) == (0, 6, 1.0, -1)
        assert data["seed"] == seed_of(4, TOKENIZER.decode(data["prompt"]), 0) % 2**31


def test_what_a_server_refuses_is_told(two, tmp_path, server):
    server.refuses = True
    with pytest.raises(
        rsoups.ServerError, match=r"answers 400 to /v1/load_lora_adapter.*No adapter found.*--max-lora-rank"
    ):
        run(two, tmp_path / "r.jsonl", server=url(server))
    assert [r["name"] for r in read_jsonl(tmp_path / "r.jsonl")] == ["base"] * len(PROMPTS), "what was answered is kept"
    assert not list(tmp_path.glob(".soups-*"))
    with pytest.raises(rsoups.ServerError, match="is not reached"):
        run(two, tmp_path / "none.jsonl", server="http://127.0.0.1:1")
    with pytest.raises(rsoups.SettingsError, match="no prediction ensembles"):
        run(two, tmp_path / "e.jsonl", REWARDS, lambdas=GRID[:1], server=url(server), ensemble=True)
