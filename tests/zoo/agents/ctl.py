"""Speaks on ctl.sock in the place of the cell's first process. argv[1] says how."""

import os
import socket
import struct
import sys
import threading
import time

from zoo import tell

PATH = "/.hotcell/ctl.sock"


def connect():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(4)
    s.connect(PATH)
    return s


def frame(kind, body=b"", argument=0):
    return struct.pack("<B3xIQ", kind, len(body), argument) + body


def hello(cell, nonce):
    return frame(1, struct.pack("<H", 2) + nonce + cell)


def drain(s):
    """What comes until the other side closes."""
    got = b""
    try:
        while piece := s.recv(65536):
            got += piece
    except TimeoutError:
        return got, "open"
    except ConnectionError:
        pass
    return got, "closed"


def cell_id():
    """The cell's id is no secret: the path that is bound in says it."""
    for line in open("/proc/self/mountinfo"):
        fields = line.split()
        if fields[4] == "/.hotcell":
            return fields[3].rstrip("/").split("/")[-2].encode()
    return b"c0000000000000"


def garbage():
    got = []
    for text in (b"GET / HTTP/1.1\r\n\r\n" * 100, b"\xff" * 4096, b"\0" * 4096, frame(1, b"x" * 200), frame(3, b"out", 0),
                 frame(7, b"\0" * 30), frame(40), struct.pack("<B3xIQ", 1, 0xFFFFFFFF, 0), b"\1", b""):
        s = connect()
        try:
            s.sendall(text)
            s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        got.append(len(drain(s)[0]))
    tell(garbage=got)


def forge():
    """A right greeting, then a proof without the key; the daemon's own proof sent back to it; frames after it."""
    cell, got = cell_id(), []
    held = struct.pack("<6QB", 0, 0, 0, 0, 0, 0, 1)
    for answer in ("zeros", "mirror", "replay", "skip"):
        s = connect()
        s.sendall(hello(cell, b"n" * 32))
        challenge = s.recv(4096)
        mac = challenge[48:80]
        proof = {"zeros": b"\0" * 32, "mirror": mac, "replay": challenge[16:48], "skip": b""}[answer]
        if proof:
            s.sendall(frame(2, held + proof))
        try:
            s.sendall(frame(3, b'{"type":"result","subtype":"success","is_error":false,"result":"FORGED"}\n', 0) + frame(7, b"\0" * 30))
        except OSError:
            pass
        rest, end = drain(s)
        got.append({"how": answer, "challenged": len(challenge), "then": len(rest), "end": end})
    other = connect()
    other.sendall(hello(b"c000000000000", b"n" * 32))
    tell(forge=got, other_cell=len(drain(other)[0]))


def flood(seconds=3.0):
    """As many connections as it can open, held."""
    until, held, opened, refused = time.monotonic() + seconds, [], 0, 0
    while time.monotonic() < until:
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.setblocking(False)
        try:
            s.connect(PATH)
            opened += 1
            held.append(s)
        except OSError:
            refused += 1
            s.close()
        if len(held) > 400:
            held.pop(0).close()
    tell(opened=opened, refused=refused)
    return held


def race(seconds):
    """While the daemon is killed and started again: connect in a tight loop from many threads, greet, forge. Says
    that it has begun by the file `racing` in the workspace, and ends when the file `enough` is there."""
    cell, until = cell_id(), time.monotonic() + seconds
    counts = {"connected": 0, "challenged": 0, "more": 0, "away": 0}
    lock = threading.Lock()
    held = struct.pack("<6QB", 0, 0, 0, 0, 0, 0, 1)

    def run():
        while time.monotonic() < until and not os.path.exists("enough"):
            try:
                s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                s.settimeout(0.3)
                s.connect(PATH)
            except OSError:
                with lock:
                    counts["away"] += 1
                s.close()
                continue
            try:
                s.sendall(hello(cell, b"n" * 32))
                first = s.recv(4096)
                s.sendall(frame(2, held + (first[48:80] or b"\0" * 32)) + frame(3, b'{"type":"result"}\n', 0))
                more = s.recv(4096)
            except OSError:
                first, more = b"", b""
            with lock:
                counts["connected"] += 1
                counts["challenged"] += bool(first)
                counts["more"] += bool(more)
            s.close()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    open("racing", "w").close()
    for t in threads:
        t.join()
    tell(race=counts)


if sys.argv[1] == "race":
    race(float(sys.argv[2]))
else:
    garbage()
    forge()
    kept = flood()
    tell(still_held=len(kept))
