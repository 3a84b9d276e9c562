"""Looks for a secret in everything that code in a cell can read. The needle comes reversed in argv[1], so that
neither this file nor the command line that the CLI keeps holds it."""

import base64
import os
import stat
import sys
import urllib.request
import urllib.error

from zoo import cli, tell

needle = sys.argv[1][::-1].encode()
needles = [needle, base64.b64encode(needle)[:-4], needle.hex().encode()]
# What must be found, or this search is worth nothing: the job's own token is in the environment and in memory.
# Where the CLI finds the token depends on the kind of provider; it stands there alone, or behind a header's name.
NAMES = ["ANTHROPIC_API_KEY", "AWS_BEARER_TOKEN_BEDROCK", "ANTHROPIC_FOUNDRY_API_KEY", "ANTHROPIC_CUSTOM_HEADERS"]
token = next(os.environ[name] for name in NAMES if name in os.environ).split(": ")[-1]
hits, control, looked, refused = [], [], 0, 0


def check(text, where):
    if any(n in text for n in needles):
        hits.append(where)
    if token.encode() in text:
        control.append(where)


def look(path, limit=512 << 20):
    global looked, refused
    try:
        with open(path, "rb", buffering=0) as file:
            tail, size = b"", 0
            while size < limit:
                piece = file.read(1 << 20)
                if not piece:
                    break
                size += len(piece)
                text = tail + piece
                check(text, path)
                tail = text[-256:]
        looked += 1
    except OSError:
        refused += 1


def memory(pid):
    """Readable memory of a process, by its maps."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            span, mode = line.split()[:2]
            if "r" not in mode or "[v" in line:
                continue
            start, end = (int(x, 16) for x in span.split("-"))
            try:
                mem.seek(start)
                text = mem.read(min(end - start, 64 << 20))
            except (OSError, ValueError):
                continue
            check(text, f"memory of {pid}")


# Every file, but for what is endless or the same for every machine.
for top, dirs, files in os.walk("/", onerror=lambda e: None):
    if top == "/":
        dirs[:] = [d for d in dirs if d not in ("proc", "sys", "usr", "lib", "lib64", "bin", "sbin")]
    for name in files:
        path = os.path.join(top, name)
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                look(path)
        except OSError:
            refused += 1
# The image's own files: what is small enough to be text.
for top, dirs, files in os.walk("/usr"):
    for name in files:
        path = os.path.join(top, name)
        try:
            if os.lstat(path).st_size < 64 << 10:
                look(path)
        except OSError:
            refused += 1

own = os.getpid()
pids = [int(p) for p in os.listdir("/proc") if p.isdigit()]
opened = {}
for pid in pids:
    for name in ("environ", "cmdline", "comm", "status", "maps", "stat", "limits", "mountinfo", "io", "stack"):
        before = refused
        look(f"/proc/{pid}/{name}")
        if name in ("environ", "maps", "io") and refused == before:
            opened.setdefault(pid, []).append(name)
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            check(os.readlink(f"/proc/{pid}/fd/{fd}").encode(), f"{pid}/fd/{fd}")
    except OSError:
        refused += 1
    if pid != own:
        try:
            memory(pid)
            opened.setdefault(pid, []).append("mem")
        except OSError:
            refused += 1
for name in os.listdir("/proc"):
    if not name.isdigit() and name not in ("kcore", "kmsg", "sysrq-trigger", "kpagecount"):
        look(f"/proc/{name}", 1 << 20)

# The model's API: what it answers to right and wrong requests, heads and bodies.
base = os.environ.get("ANTHROPIC_BASE_URL", "http://127.0.0.1:3129")
good = b'{"model":"claude-sonnet-4-6","max_tokens":16,"messages":[{"role":"user","content":"echo"}]}'
answers = []
for path, key, body in [
    ("/v1/messages", token, good),
    ("/v1/messages", token, b"{"),
    ("/v1/messages", "wrong", good),
    ("/v1/models", token, None),
    ("/", token, None),
    ("/v1/messages", token, good.replace(b"sonnet-4-6", b"none")),
]:
    request = urllib.request.Request(base + path, data=body, headers={"x-api-key": key, "content-type": "application/json"})
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    text = str(answer.headers).encode() + answer.read()
    answers.append(answer.status)
    check(text, f"answer {answer.status} of {path}")

tell(hits=hits, control=sorted(set(control)), init_and_cli=[1, cli()], looked=looked, refused=refused, answers=answers, pids=len(pids), own=own,
     opened={str(pid): names for pid, names in opened.items()}, parent=os.getppid())
