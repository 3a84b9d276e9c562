"""Looks round: who am I, what can I see, what can I write, whom can I reach."""

import ctypes
import os
import resource
import select
import socket
import stat
import struct

from zoo import read, tell, try_to

status = dict(line.split(":\t", 1) for line in read("/proc/self/status").decode().splitlines() if ":\t" in line)
tell(uid=os.getuid(), gid=os.getgid(), groups=os.getgroups(), hostname=socket.gethostname(),
     status={k: status[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")},
     nofile=resource.getrlimit(resource.RLIMIT_NOFILE), core=resource.getrlimit(resource.RLIMIT_CORE))


def write(path):
    def act():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.close(fd)
        os.unlink(path)
    return try_to(act)


tell(writes={path: write(path) for path in (
    "/zoo", "/etc/zoo", "/usr/zoo", "/usr/local/bin/zoo", "/var/zoo", "/var/tmp/zoo", "/root/zoo", "/opt/zoo", "/run/zoo",
    "/.hotcell/zoo", "/.hotcell-agent/zoo", "/etc/passwd", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname",
    "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/zoo", "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/pids/pids.max", "/dev/zoo", "/dev/shm/zoo", "/dev/mqueue/zoo",
    "/workspace/zoo", "/home/agent/zoo", "/tmp/zoo")})

mounts = []
for line in read("/proc/self/mountinfo").decode().splitlines():
    left, right = line.split(" - ")
    fields, (kind, source, _) = left.split(), right.split(" ", 2)
    mounts.append({"at": fields[4], "options": fields[5], "root": fields[3], "type": kind, "source": source,
                   "super": right.split(" ", 2)[2].split(",")[0]})
tell(mounts=mounts)

tell(devices_of_net=[l.split(":")[0].strip() for l in read("/proc/net/dev").decode().splitlines()[2:]],
     routes=read("/proc/net/route").decode().splitlines()[1:],
     routes6=[l for l in read("/proc/net/ipv6_route").decode().splitlines() if not l.rstrip().endswith("lo")]
     if os.path.exists("/proc/net/ipv6_route") else [],
     resolv=read("/etc/resolv.conf").decode().split(), hosts=read("/etc/hosts").decode().split())


def dns(to):
    query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"\7example\3com\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        s.connect((to, 53))
        s.send(query)
        return s.recv(512)


def reach(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(2)
        s.connect(address)


tell(dns={to: try_to(lambda: dns(to)) for to in ("127.0.0.1", "127.0.0.11", "8.8.8.8", "169.254.169.254")},
     name=try_to(lambda: socket.getaddrinfo("example.com", 80)),
     reach={str(a): try_to(lambda: reach(f, a)) for f, a in (
         (socket.AF_INET, ("1.1.1.1", 443)), (socket.AF_INET, ("169.254.169.254", 80)), (socket.AF_INET, ("172.17.0.1", 22)),
         (socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET6, ("2606:4700:4700::1111", 443)),
         (socket.AF_UNIX, "/var/run/docker.sock"), (socket.AF_UNIX, "/run/docker.sock"), (socket.AF_UNIX, "/run/containerd/containerd.sock"),
         (socket.AF_UNIX, "/run/hotcell/hotcell.sock"), (socket.AF_UNIX, "\0docker"))},
     abstract=[l.split()[-1] for l in read("/proc/net/unix").decode().splitlines()[1:] if l.split()[-1].startswith("@")])

sockets, setuid, devices = [], [], []
for top, dirs, files in os.walk("/", onerror=lambda e: None):
    if top == "/":
        dirs[:] = [d for d in dirs if d not in ("proc", "sys")]
    for name in files:
        path = os.path.join(top, name)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            continue
        if stat.S_ISSOCK(mode):
            sockets.append(path)
        if stat.S_ISREG(mode) and mode & 0o6000:
            setuid.append(path)
        if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            devices.append(path)
tell(sockets=sockets, setuid=setuid, devices=devices, run=try_to(lambda: os.listdir("/.hotcell")), cells=[n for n in ("ctl.sock", "api.sock", "..", "key", "../ctl.sock") if os.path.exists("/.hotcell/" + n)])


def content(path):
    try:
        if os.path.isdir(path):
            return sorted(os.listdir(path))
        return read(path, 256).decode(errors="replace")
    except OSError as error:
        return "error " + str(error.errno)


masked = ["/proc/cmdline", "/proc/config.gz", "/proc/kallsyms", "/proc/modules", "/proc/interrupts", "/proc/slabinfo", "/proc/keys",
          "/proc/kcore", "/proc/timer_list", "/proc/iomem", "/proc/diskstats", "/proc/partitions", "/proc/swaps", "/sys/firmware", "/sys/module", "/sys/block",
          "/sys/class/dmi", "/sys/class/block", "/sys/dev/block", "/sys/devices/virtual/dmi", "/sys/devices/virtual/block",
          "/sys/kernel/debug", "/sys/kernel/security", "/sys/fs/bpf", "/sys/kernel/mm"]
tell(masked={path: content(path) for path in masked})

# What /sys tells of other cells: the files behind loop devices are named by their paths on the host.
backing, dmi = [], []
for top, dirs, files in os.walk("/sys/devices", onerror=lambda e: None):
    for name in files:
        path = os.path.join(top, name)
        if name == "backing_file":
            backing.append(content(path))
        if name in ("product_name", "sys_vendor", "product_uuid", "bios_vendor", "serial", "wwid", "address") and "/net/lo" not in path:
            text = content(path)
            if not text.startswith("error") and text.strip():
                dmi.append(path)
tell(backing=backing, dmi=dmi, locks=content("/proc/locks"))


libc = ctypes.CDLL(None, use_errno=True)
x64 = os.uname().machine != "aarch64"


def call(a, b, *args):
    result = libc.syscall(ctypes.c_long(a if x64 else b), *[ctypes.c_long(x) for x in args])
    return "done" if result >= 0 else str(ctypes.get_errno())


def chmod():
    open("/tmp/s", "w").close()
    os.chmod("/tmp/s", 0o4755)


def af_alg():
    with socket.socket(38, socket.SOCK_SEQPACKET, 0) as s:
        s.bind(("hash", "sha1"))


tell(calls={
    "vsock": try_to(lambda: socket.socket(40, socket.SOCK_STREAM)), "alg": try_to(af_alg), "packet": try_to(lambda: socket.socket(17, socket.SOCK_RAW)),
    "raw": try_to(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)), "bluetooth": try_to(lambda: socket.socket(31, socket.SOCK_RAW)),
    "netlink audit": try_to(lambda: socket.socket(16, socket.SOCK_RAW, 9)), "netlink netfilter": try_to(lambda: socket.socket(16, socket.SOCK_RAW, 12)),
    "io_uring": call(425, 425, 1, 0), "unshare user": call(272, 97, 0x10000000), "unshare net": call(272, 97, 0x40000000),
    "ptrace": call(101, 117, 0, 0, 0, 0), "bpf": call(321, 280, 0, 0, 0), "keyctl": call(250, 219, 0, 0), "add_key": call(248, 217, 0, 0, 0, 0, 0),
    "perf": call(298, 241, 0, 0, 0, 0, 0), "userfaultfd": call(323, 282, 0), "mount": call(165, 40, 0, 0, 0, 0, 0), "setns": call(308, 268, 0, 0),
    "open_by_handle": call(304, 265, 0, 0, 0), "fsopen": call(430, 430, 0, 0), "memfd_secret": call(447, 447, 0), "reboot": call(169, 142, 0, 0, 0, 0),
    "syslog": call(103, 116, 3, 0, 0), "chroot": try_to(lambda: os.chroot("/tmp")), "setuid": try_to(lambda: os.setuid(0)),
    "chmod setuid": try_to(chmod), "open setuid": try_to(lambda: os.open("/tmp/s2", os.O_CREAT | os.O_WRONLY, 0o4755)),
    "mknod": try_to(lambda: os.mknod("/tmp/d", 0o060600, os.makedev(254, 0))), "fanotify": call(300, 262, 0, 0), "quotactl": call(179, 60, 0, 0, 0, 0),
    "link hotcell": try_to(lambda: os.link("/.hotcell/api.sock", "/tmp/api.sock"))})
