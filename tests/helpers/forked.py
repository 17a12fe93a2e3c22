"""Python processes that start at once: forked from one that has imported torch, TRL and the rest, which takes seconds.

`warm_python()` is an executable for the place of `sys.executable`. A process that it starts is one of its own, with its own
arguments, environment, folder, pipes, signals and exit code; its own `sys.executable` is warm too. What other packages read
from the environment when they are imported (HF_ENDPOINT, OMP_NUM_THREADS) is that of `warm_python(**environment)`.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

# Client: hands arguments, environment, folder and the three standard files to the server; ends as its process ends.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
first = words[0] if words else ""
flags = ("-c", "-m", "-u", "-W")
if (first.startswith("-") and first not in flags) or "rsoups.common.unpickle" in words:  # its memory is bounded
    os.execv({python!r}, [{python!r}, *words])
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps({{"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "executable": sys.argv[0]}})
data = request.encode()
socket.send_fds(link, [len(data).to_bytes(4, "big")], [0, 1, 2])
link.sendall(data)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: link.sendall(bytes([number])))
code = int.from_bytes(link.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""

# Server: forks a supervisor for each request, which forks the process itself.
SERVER = """
import atexit, gc, importlib, json, os, runpy, select, signal, socket, sys, threading, traceback, types, warnings

for name in {modules!r}:
    package, _, attribute = name.partition(":")
    module = importlib.import_module(package)
    attribute and getattr(module, attribute)
gc.freeze()
listener = socket.socket(socket.AF_UNIX)
listener.bind({address!r})
listener.listen(64)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)


def next_process():
    while True:
        ready = select.select([listener, 0], [], [])[0]
        if 0 in ready:
            os._exit(0)  # the tests have ended
        link, _ = listener.accept()
        if os.fork():
            link.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, files, _, _ = socket.recv_fds(link, 4, 3)
        data = b""
        while len(data) < int.from_bytes(size, "big"):
            data += link.recv(1 << 20)
        process = os.fork()
        if not process:
            link.close()
            return json.loads(data), files
        supervise(link, process, files)


def supervise(link, process, files):
    for file in (0, 1, 2, *files):
        os.close(file)  # whoever reads a pipe waits for its last writer
    watched = os.pidfd_open(process)
    while watched not in (ready := select.select([link, watched], [], [])[0]):
        number = link.recv(1)
        os.kill(process, number[0] if number else signal.SIGKILL)
        if not number:
            break  # the client was killed
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        link.sendall(code.to_bytes(4, "big", signed=True))
    finally:
        os._exit(0)


request, files = next_process()
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
words = request["words"]
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.executable = request["executable"]
sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", encoding="utf-8", closefd=False) for n in range(3))
sys.path[:1] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
while words and words[0] in ("-u", "-W"):
    if words.pop(0) == "-W":
        warnings.simplefilter(words.pop(0))
    else:
        sys.stdout.reconfigure(write_through=True)
kind = words.pop(0)
exit_code = 0
try:
    if kind == "-m":
        sys.argv = list(words)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [kind, *words]
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")
except SystemExit as end:
    exit_code = end.code or 0
    if not isinstance(exit_code, int):
        exit_code = print(exit_code, file=sys.stderr) or 1
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    traceback.print_exc()
    exit_code = 1
# Python would now take everything apart that it has imported, which takes seconds.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(exit_code)
"""

MODULES = [
    "torch",
    "transformers:AutoModelForCausalLM",
    "transformers:Trainer",
    "transformers.models.llama.modeling_llama",
]
MODULES += [
    "transformers.models.deberta_v2.modeling_deberta_v2",
    "datasets",
    "peft",
    "trl:GRPOTrainer",
    "trl:SFTTrainer",
]
MODULES += ["trl:RLOOTrainer", "trl:TrlParser", "accelerate.commands.config", "torch.distributed.run", "moocore"]
MODULES += ["matplotlib.pyplot", "pydantic", "safetensors.torch", "yaml", "jinja2"]


_starting = Lock()


def warm_python(**environment: str) -> str:
    """Path of the executable; the process that it forks from is made at the first call with this environment."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable  # not Linux
    with _starting:
        return _started(tuple(sorted(environment.items())))


@cache
def _started(environment: tuple[tuple[str, str], ...]) -> str:
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address = str(folder / "socket")
    command = [sys.executable, "-c", SERVER.format(modules=MODULES, address=address)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(
        command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment), **pipes
    )
    assert server.stdout and server.stdout.readline() == "ready\n"

    def stop():
        server.communicate()  # closes its standard input, at which it ends
        shutil.rmtree(folder)

    atexit.register(stop)
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    return str(client)
