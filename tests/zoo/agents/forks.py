"""A fork bomb with a memory: forks until it cannot, counts, kills its children, and goes on."""

import errno
import os
import signal
import time

from zoo import read, tell

children, error = [], "none"
until = time.monotonic() + 20
while time.monotonic() < until and len(children) < 20_000:
    try:
        pid = os.fork()
    except OSError as e:
        error = errno.errorcode[e.errno]
        break
    if pid == 0:
        signal.pause()
        os._exit(0)
    children.append(pid)
peak = len([p for p in os.listdir("/proc") if p.isdigit()])
for pid in children:
    os.kill(pid, signal.SIGKILL)
for pid in children:
    os.waitpid(pid, 0)
tell(forked=len(children), error=error, processes=peak)
