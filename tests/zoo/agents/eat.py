"""Takes memory until it is killed for it. The score makes it the kernel's first choice."""

import os
import sys

from zoo import tell

limit = int(sys.argv[1])
pid = os.fork()
if pid == 0:
    held = []
    while len(held) * 16 < limit * 2:
        held.append(bytearray(os.urandom(1)) * (16 << 20))
    os._exit(0)
_, status = os.waitpid(pid, 0)
tell(eater="killed by %d" % os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exit %d" % os.WEXITSTATUS(status))
