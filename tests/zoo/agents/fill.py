"""Writes until the disk of the cell is full, in HOME and in /tmp, then runs out of inodes; cleans up after itself."""

import errno
import os

from zoo import tell

before = os.statvfs("/tmp")


def fill(directory):
    written, error = 0, "none"
    path = os.path.join(directory, "fill")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    block = os.urandom(1 << 20)
    try:
        while written < 4 << 30:
            written += os.write(fd, block)
    except OSError as e:
        error = errno.errorcode[e.errno]
    os.close(fd)
    return path, written, error


def many(directory):
    count, error = 0, "none"
    top = os.path.join(directory, "many")
    os.mkdir(top)
    try:
        while count < 400_000:
            os.close(os.open(os.path.join(top, str(count)), os.O_CREAT | os.O_WRONLY, 0o600))
            count += 1
    except OSError as e:
        error = errno.errorcode[e.errno]
    return top, count, error


first, in_tmp, tmp_error = fill("/tmp")
second, in_home, home_error = fill(os.environ["HOME"])
kind = [l.split(" - ")[1].split()[0] for l in open("/proc/self/mountinfo") if l.split()[4] in ("/tmp", os.environ["HOME"])]
os.unlink(first)
os.unlink(second)
top, files, inode_error = many("/tmp")
for name in os.listdir(top):
    os.unlink(os.path.join(top, name))
os.rmdir(top)
tell(size=before.f_blocks * before.f_frsize, in_tmp=in_tmp, tmp_error=tmp_error, in_home=in_home, home_error=home_error,
     types=kind, files=files, inode_error=inode_error)
