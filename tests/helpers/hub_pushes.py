"""Pushes to a Hub on loopback, each in a process of its own."""

from hub_server import TOKEN, files_with_the_token

PUSH = """
import ast, sys, time, rsoups
time.sleep = lambda seconds: print(f"waited {seconds:g}")
soup = rsoups.interpolate({"helpful": sys.argv[1], "harmless": sys.argv[2]}, [0.3, 0.7])
try:
    print(soup.push_to_hub("someone/soup", **ast.literal_eval(sys.argv[3])))
except rsoups.RsoupsError as error:
    print(f"{type(error).__name__}: {error}")
"""


def python(hub, folder, code, *arguments, expect=0):
    """Run code in a folder, in a process of its own; nothing ever shows the token, nor is it in any file."""
    status, out, err = hub.client(folder, code, *arguments)
    assert status == expect, err
    assert TOKEN not in out + err and not files_with_the_token(folder)
    return (out if expect == 0 else err).strip()


def push(hub, two, **options):
    return python(hub, two[0].parent, PUSH, *two, repr(options))


def cli(hub, folder, *arguments, expect=0):
    return python(
        hub,
        folder,
        f"import sys, rsoups.cli.main; sys.exit(rsoups.cli.main.main({[str(a) for a in arguments]}))",
        expect=expect,
    )


FILES = {"adapter_model.safetensors", "adapter_config.json", "soup.json", "README.md"}
PULL = """
import sys, rsoups, json
for source in sys.argv[1:]:
    print(json.dumps(rsoups.Soup.from_pretrained(source).lambdas))
"""


def card_of(soup, folder, **options):
    soup.push_to_hub("someone/soup", dry_run=folder, **options)
    return (folder / "README.md").read_text("utf-8")
