"""The kernel from inside: calls of other tables, namespaces, cgroups, rights, and the host's own sockets, whose names come in argv."""

import ctypes
import mmap
import os
import platform
import signal
import socket
import stat
import sys

from zoo import read, tell, try_to

libc = ctypes.CDLL(None, use_errno=True)
x64 = platform.machine() == "x86_64"


def ends(act):
    """How a child ends that does it: a signal's name, or its code."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"


def int80():
    """getpid of the 32-bit table."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def call(a, b, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(a if x64 else b), *[ctypes.c_long(x) for x in args])
    return "done" if result >= 0 else {1: "EPERM", 13: "EACCES", 22: "EINVAL", 38: "ENOSYS"}.get(ctypes.get_errno(), str(ctypes.get_errno()))


tell(foreign={"int80": ends(int80), "x32": ends(lambda: libc.syscall(ctypes.c_long(0x40000000 + 39)))} if x64 else {})
FLAGS = {"time": 0x80, "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
spaces = {f"unshare {name}": call(272, 97, flag) for name, flag in FLAGS.items()}
spaces |= {f"unshare user and {name}": call(272, 97, flag | FLAGS["user"]) for name, flag in FLAGS.items()}
spaces |= {f"clone {name}": call(56, 220, flag | signal.SIGCHLD, 0, 0, 0, 0) for name, flag in FLAGS.items() if name != "time"}
args = (ctypes.c_uint64 * 11)(FLAGS["user"])
spaces["clone3 user"] = call(435, 435, ctypes.addressof(args), 88)
args = (ctypes.c_uint64 * 11)(0)
spaces["clone3 of nothing"] = call(435, 435, ctypes.addressof(args), 88)
spaces["setns"] = try_to(lambda: os.open("/proc/1/ns/net", os.O_RDONLY))
for name in ("user", "net", "mnt", "pid"):
    fd = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
    spaces[f"setns {name}"] = call(308, 268, fd, 0)
    os.close(fd)
for name in ("uid_map", "gid_map"):
    spaces[f"write {name}"] = try_to(lambda: os.write(os.open(f"/proc/self/{name}", os.O_WRONLY), b"0 0 1"))
header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
tell(spaces=spaces, setuid={"setuid": call(105, 146, 0), "setgid": call(106, 144, 0), "setgroups": call(116, 159, 1, 0), "capset": call(126, 91, ctypes.addressof(header), ctypes.addressof(rights)),
                            "securebits": call(157, 167, 28, 1), "seccomp off": call(157, 167, 22, 0)})

writable = []
for top, dirs, files in os.walk("/sys", onerror=lambda e: None):
    for name in dirs + files:
        path = os.path.join(top, name)
        # What is masked is the null device, which anybody may write to.
        mode = os.lstat(path).st_mode
        if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and os.access(path, os.W_OK):
            writable.append(path)
tell(cgroup={"own": sorted({line.split(":", 2)[2] for line in read("/proc/self/cgroup").decode().splitlines()}), "writable": writable,
             "mkdir": try_to(lambda: os.mkdir("/sys/fs/cgroup/zoo")),
             "release_agent": try_to(lambda: os.open("/sys/fs/cgroup/memory/release_agent", os.O_WRONLY)),
             "mount": call(165, 40, 0, 0, 0, 0, 0), "proc sys": try_to(lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))})


def reach(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(3)
        s.connect(address)
        s.send(b"from the cell")
        return s.recv(1)


name, port = sys.argv[1], int(sys.argv[2])
tell(host={"abstract": try_to(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + name)),
           "abstract datagrams": try_to(lambda: reach(socket.AF_UNIX, socket.SOCK_DGRAM, "\0" + name)),
           "loopback": try_to(lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))),
           "loopback 6": try_to(lambda: reach(socket.AF_INET6, socket.SOCK_STREAM, ("::1", port))),
           "any": try_to(lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", port))),
           "docker.sock": try_to(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, "/var/run/docker.sock")),
           "docker.sock by way of init": try_to(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, "/proc/1/root/var/run/docker.sock"))},
     knows={path: try_to(lambda: len(read(path))) and os.path.exists(path) and (read(path, 64).decode(errors="replace") if os.path.isfile(path) else "") for path in ("/proc/cmdline", "/proc/config.gz", "/proc/kallsyms")})
