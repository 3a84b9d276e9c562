"""What the zoo's agents share: one line for the test per finding, and names for errors."""

import errno
import json
import os


def tell(**found):
    """One finding a line; the test collects the lines that begin with ZOO."""
    for name, value in found.items():
        print("ZOO " + json.dumps({name: value}), flush=True)


def try_to(act):
    """`done`, or the name of the error."""
    try:
        act()
        return "done"
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except Exception as error:  # noqa: BLE001: whatever it is, the test wants its name
        return type(error).__name__


def read(path, most=1 << 20):
    with open(path, "rb") as file:
        return file.read(most)


def cli():
    """The CLI: the ancestor that PID 1 started."""
    pid = os.getpid()
    while True:
        stat = read(f"/proc/{pid}/stat").decode()
        parent = int(stat.rsplit(")", 1)[1].split()[1])
        if parent <= 1:
            return pid
        pid = parent
