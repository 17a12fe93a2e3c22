"""A small OpenAI-compatible server on loopback: what it answers is a queue of faults, then a function of the request."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class JudgeServer(ThreadingHTTPServer):
    """`faults`: (status, headers, body) or "cut", each answered once, in order. `answer`: a request's body -> the content."""

    daemon_threads = True

    def __init__(self, answer, delay=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.delay, self.faults = answer, delay, []
        self.seen, self.times, self.at_once, self.most_at_once = [], [], 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()  # it then stops at once

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.delay)
        with server.lock:
            server.at_once -= 1
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif fault is not None:
            self._send(*fault)
        else:
            content = server.answer(body)
            usage = {"prompt_tokens": 100, "completion_tokens": 7}
            reply = {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage}
            self._send(200, {}, json.dumps(reply))

    def _send(self, status, headers, body):
        data = body.encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def rate(body):
    """A rating that depends on the response: its number of words."""
    text = body["messages"][0]["content"]
    words = text.rpartition("<response>\n")[2].partition("\n</response>")[0].split()
    return json.dumps({"score": min(len(words), 5)})


def card_of(tmp_path, server, name="helpful", **fields):
    judge = {"endpoint": server.url, "model": "m", "rubric": "Is it helpful?"} | fields
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "judge": judge, "mean": 1, "std": 2}))
    return path


PROMPTS = [f"### Instruction: Do it. ### Input: question {i} ### Response: " for i in range(4)]
RESPONSES = ["a", "a b", "a b c", "a b c d e f g"]
