# Looks for secrets in all that a cell's user can read. They are given backwards, so that this file has none.
import os, sys

secrets = [word[::-1].encode() for word in sys.argv[1:]]
looked, found = 0, []


def look(path, limit=1 << 30):
    global looked
    try:
        with open(path, "rb") as file:
            tail = b""
            while limit > 0 and (piece := file.read(1 << 20)):
                limit -= len(piece)
                if any(secret in tail + piece for secret in secrets):
                    found.append(path)
                    break
                tail = piece[-200:]
        looked += 1
    except OSError:
        pass


for top, directories, files in os.walk("/"):
    if top in ("/proc", "/sys"):
        directories.clear()
    for name in files:
        path = os.path.join(top, name)
        if os.path.isfile(path) and not os.path.islink(path):
            look(path)
for process in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "maps"):
        look(f"/proc/{process}/{name}", 1 << 20)
print(f"looked at {looked} files, found {found}")
