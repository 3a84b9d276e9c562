# What an agent does to a repository that it has never seen: edits, deletes, renames, of files and of a directory,
# modes, links, binary files, odd names. The files are chosen by their sorted names, so that each run does the same.
# At last it tells how many files it leaves and the hash of all that is in them.
import hashlib, os, shutil, stat, subprocess

os.umask(0o022)
listed = subprocess.run(["git", "ls-files", "-s", "-z"], stdout=subprocess.PIPE, check=True).stdout.split(b"\0")
by_mode = {}
for line in filter(None, listed):
    head, path = line.split(b"\t", 1)
    # What is hidden from the cell is listed and not there; what git reads about files decides how a patch applies.
    if os.path.lexists(path) and not os.path.basename(path).startswith(b".git"):
        by_mode.setdefault(head[:6], []).append(path)
pool = sorted(by_mode[b"100644"])


def below(path, directory):
    return path.startswith(directory + b"/")


def leave(directory):
    pool[:] = [path for path in pool if not below(path, directory)]


def take(count):
    chosen = [pool[len(pool) * k // count] for k in range(count)]
    pool[:] = sorted(set(pool) - set(chosen))
    return chosen


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


sizes = {}
for path in (path for paths in by_mode.values() for path in paths):
    parts = path.split(b"/")[:-1]
    for end in range(1, len(parts) + 1):
        name = b"/".join(parts[:end])
        sizes[name] = sizes.get(name, 0) + 1

# A directory of some size gets another name, a small one goes, another becomes a file.
large = next(name for name in sorted(sizes) if b"/" in name and 20 <= sizes[name] <= 2000)
# As `mv` does it: the kernel moves no directory of an overlay's lower layer.
subprocess.run(["mv", large, large + b" renamed"], check=True)
leave(large)
small = [name for name in sorted(sizes) if b"/" in name and sizes[name] in (2, 3) and not below(name, large)]
shutil.rmtree(small[0])
leave(small[0])
shutil.rmtree(small[-1])
leave(small[-1])
write(small[-1], b"a file where a directory was\n")

for path in take(30):
    lines = read(path).split(b"\n")
    lines.insert(len(lines) // 2, b"a line of the agent's")
    write(path, b"\n".join(lines))
for path in take(5):
    write(path, read(path) + b"\nno line feed at the end")
# Where the repository says which line ends git writes, git would undo it.
for path in take(12):
    attributes = subprocess.run(["git", "check-attr", "text", "eol", "--", path], stdout=subprocess.PIPE, check=True).stdout
    if attributes.count(b": unspecified") == 2:
        write(path, read(path).replace(b"\n", b"\r\n"))
for path in take(2):
    write(path, b"")
for path in take(20):
    os.unlink(path)

os.makedirs(b"moved/by the agent")
for number, path in enumerate(take(20)):
    if number % 4 == 0:
        write(path, b"a new first line\n" + read(path))
    os.rename(path, b"moved/by the agent/%02d-%s" % (number, os.path.basename(path).lstrip(b".")))

for path in take(5):
    os.chmod(path, 0o755)
for path in sorted(by_mode.get(b"100755", []))[:3]:
    if os.path.lexists(path):
        os.chmod(path, 0o644)

binary = [path for path in pool if path.endswith((b".png", b".gif", b".ico", b".gz", b".bundle", b".zip"))][:3]
for path in binary:
    content = bytearray(read(path))
    content[len(content) // 2] ^= 0xFF
    write(path, bytes(content) + b"\0more")
leave_out = set(binary)
pool[:] = [path for path in pool if path not in leave_out]
write(b"new-binary", bytes(range(256)) * 300)
write(b"large-binary", hashlib.shake_256(b"hotcell").digest(1_300_000))

links = [path for path in sorted(by_mode.get(b"120000", [])) if os.path.lexists(path)]
if links:
    os.unlink(links[0])
    os.symlink(b"elsewhere", links[0])
for path in take(2):
    os.unlink(path)
    os.symlink(b"new-binary", path)
for path in take(2):
    os.unlink(path)
    os.mkdir(path)
    write(path + b"/inner", b"a directory where a file was\n")
for name in (b'odd \t\n"name" \\ \xc3\xa9', b"not utf-8 \xff\xfe", b"-dash", b"Case-Clash", b"case-clash"):
    write(name, b"new " + name)
write(b"empty-file", b"")

# Git knows no empty directories.
for directory, _, _ in os.walk(b".", topdown=False):
    if not below(directory, b"./.git") and directory != b"./.git" and not os.listdir(directory):
        os.rmdir(directory)

files = []
for directory, names, leaves in os.walk(b"."):
    if directory == b".":
        names.remove(b".git")
    files += [os.path.join(directory, leaf)[2:] for leaf in leaves]
    files += [os.path.join(directory, name)[2:] for name in names if os.path.islink(os.path.join(directory, name))]
left = hashlib.sha256()
for path in sorted(files):
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        what = b"link " + os.readlink(path)
    else:
        what = b"%o %s" % (mode & 0o7777, hashlib.sha256(read(path)).hexdigest().encode())
    left.update(path + b"\0" + what + b"\n")
print("AGENT-LEFT", len(files), left.hexdigest(), "AGENT-END")
