"""A stand-in on loopback that speaks vLLM's API: a tiny base, and the adapters that it is told to load."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel


class StandIn(ThreadingHTTPServer):
    """
    Attributes:
        loaded: Models by name.
        asked: Bodies of the completions that were asked for.
        loads: Names of adapters, in the order of their loading.
        busy: Number of completions that are refused for a moment.
        down: Number of requests of any kind whose connection is cut.
        restarts_at: Counts of completions after which the adapters are forgotten.
        base: Name of the base.
        max_rank, runtime: Settings of the server.
        hides: Fields that the server's completions lack.
        crowded: Number of prompts read for log-probabilities beside another request: a real server may die of it.
    """

    daemon_threads = True

    def __init__(self, base_model, tokenizer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_model, self.tokenizer, self.base, self.lock = base_model, tokenizer, "tiny", threading.Lock()
        self.counting, self.at_once, self.crowded = threading.Lock(), 0, 0
        self.loaded, self.asked, self.loads, self.keys = {}, [], [], set()
        self.busy, self.down, self.restarts_at, self.max_rank, self.runtime, self.hides = 0, 0, [], 64, True, ()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


@contextmanager
def stand_in(base_model, tokenizer):
    """A running stand-in; `base_model` makes the base."""
    server = StandIn(base_model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
        assert not server.crowded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.is_cut():
            return
        loaded = [{"id": name, "parent": self.server.base} for name in self.server.loaded]
        self.answer(200, {"data": [*loaded, {"id": self.server.base, "parent": None}]})

    def do_POST(self):
        if self.is_cut():
            return
        server = self.server
        server.keys.add(self.headers["Authorization"])
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.counting:
            server.at_once += 1
            server.crowded += data.get("prompt_logprobs") is not None and server.at_once > 1
        with server.lock:
            # The random numbers are as before when the trainer, which draws from them too, has its answer.
            with torch.random.fork_rng(devices=[]):
                answer = self.answer_to(data)
            with server.counting:
                server.at_once -= 1
            self.answer(*answer)

    def answer_to(self, data):
        server = self.server
        if self.path == "/v1/completions":
            return self.completion(data)
        if not server.runtime:
            return 404, {"detail": "Not Found"}
        if self.path == "/v1/load_lora_adapter":
            return self.load(data)
        known = server.loaded.pop(data["lora_name"], None)
        return 200 if known else 404, {"message": data["lora_name"]}

    def is_cut(self):
        with self.server.lock:
            cut = self.server.down > 0
            self.server.down -= cut
        if cut:
            self.close_connection = True
        return cut

    def load(self, data):
        server, folder, name = self.server, Path(data["lora_path"]), data["lora_name"]
        if name in server.loaded:
            return 400, {"message": f"The lora adapter '{name}' has already been loaded."}
        if not (folder.is_absolute() and (folder / "adapter_model.safetensors").is_file()):
            return 404, {"message": f"No adapter found for {folder}"}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
        if config["r"] > server.max_rank:
            return 500, {"message": f"LoRA rank {config['r']} is greater than max_lora_rank {server.max_rank}."}
        server.loaded[name] = PeftModel.from_pretrained(server.base_model(), folder).eval()
        server.loads.append(name)
        return 200, {}

    @torch.no_grad()
    def completion(self, data):
        server = self.server
        server.asked.append(data)
        if len(server.asked) in server.restarts_at:
            server.loaded.clear()
        if server.busy:
            server.busy -= 1
            return 503, {"message": "busy"}
        model = server.base_model() if data["model"] == server.base else server.loaded.get(data["model"])
        if model is None:
            return 404, {"error": {"message": f"The model `{data['model']}` does not exist."}}

        ids, logits = responded(model, data)
        choice = {"text": server.tokenizer.decode(ids, skip_special_tokens=True), "token_ids": ids}
        if data.get("prompt_logprobs") is not None:
            read = logits[: len(data["prompt"]) - 1].log_softmax(-1)
            rows = [{str(token): {"logprob": float(row[token])}} for row, token in zip(read, data["prompt"][1:])]  # noqa: B905
            choice["prompt_logprobs"] = [None, *rows]
        choice = {name: value for name, value in choice.items() if name not in server.hides}
        return 200, {"choices": [choice], "usage": {"completion_tokens": len(ids)}}

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def responded(model, data):
    """Tokens of a response, sampled or greedy, and the logits of the whole text before its last token, (n, V)."""
    ends = {model.config.eos_token_id, *data.get("stop_token_ids", [])}
    generator = torch.Generator().manual_seed(data.get("seed", 0))
    ids: list[int] = []
    while True:
        logits = model(input_ids=torch.tensor([data["prompt"] + ids])).logits[0].float()
        if data["temperature"]:
            weights = (logits[-1] / data["temperature"]).softmax(-1)
            ids.append(int(torch.multinomial(weights, 1, generator=generator)))
        else:
            ids.append(int(logits[-1].argmax()))
        if ids[-1] in ends or len(ids) == data["max_tokens"]:
            return ids, logits
