"""Takes away what the cell's first process and the CLI need, by their resource limits: a process may set those
of another one of its user, and no dumpable bit stands in the way."""

import resource

from zoo import cli, read, tell, try_to

for name, pid in (("init", 1), ("cli", cli())):
    for what in ("NOFILE", "FSIZE", "CPU"):
        limit = getattr(resource, "RLIMIT_" + what)
        tell(**{f"{name} {what}": try_to(lambda: resource.prlimit(pid, limit, (1, 1)))})
tell(own=try_to(lambda: resource.prlimit(0, resource.RLIMIT_NOFILE)),
     limits=read("/proc/1/limits").decode().split("Max open files")[1].split()[0])
