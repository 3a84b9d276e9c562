#!/usr/bin/env python3
"""Lays out what `.ci/packages` fetched as the registries that the tests serve, and the sample projects beside them.

    lay.py FETCHED OUT    reads FETCHED/*, writes OUT/mirror/* and OUT/projects/*

What a directory of a registry answers for itself is its file `.index.json` or `.index.html`. Nothing here is fetched;
the same input makes the same bytes, but for the archives of Go modules, whose compression is Python's.
"""

import base64
import gzip
import hashlib
import html
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
# Module, version, the Debian package's directory, and what it needs. Where Debian's go.mod names what only tests need,
# or where there is none, ours does not.
GO_MODULES = [
    ("github.com/davecgh/go-spew", "v1.1.1", []),
    ("github.com/pmezard/go-difflib", "v1.0.0", []),
    ("github.com/stretchr/objx", "v0.5.0", []),
    ("gopkg.in/yaml.v3", "v3.0.1", []),
]
GO_PROJECT = "github.com/stretchr/testify"
QS_INTEGRITY = "sha512-+38qI9SOr8tfZ4QmJNplMUxqjbe7LKvvZgWdExBOmd+egZTtjLB67Gu0HRX3u/XOq7UU2Nx6nsjvS16Z9uwfpg=="
CSV_SHA256 = "ac574ff4d437a7b5ad237ef331c17ccca63c46479e5b5453eb8e10bb99a759fe"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def unpack(archive, to):
    """The one directory that a source archive holds, as `to`; no file is set-id, none leaves it."""
    to.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = pathlib.PurePosixPath(member.name).parts[1:]
            if not parts or ".." in parts or not (member.isfile() or member.isdir()):
                continue
            target = to.joinpath(*parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            put(target, tar.extractfile(member).read())
            target.chmod(0o755 if member.mode & 0o100 else 0o644)


def npm(fetched, mirror, project):
    lock = json.loads((HERE / "node/package-lock.json").read_text())["packages"]
    wanted = {entry["integrity"] for name, entry in lock.items() if name}
    packages = {}
    for tarball in sorted(fetched.glob("*.tgz")):
        data = tarball.read_bytes()
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        with tarfile.open(tarball) as tar:
            member = min((m for m in tar if m.name.endswith("/package.json")), key=lambda m: m.name.count("/"))
            meta = json.loads(tar.extractfile(member).read())
        name, version = meta["name"], meta["version"]
        if integrity == QS_INTEGRITY:
            unpack(tarball, project)
        elif integrity not in wanted:
            sys.exit(f"{name}@{version} from the registry is not what package-lock.json says")
        wanted.discard(integrity)
        file = f"{name}/-/{name.split('/')[-1]}-{version}.tgz"
        put(mirror / file, data)
        keep = ["name", "version", "dependencies", "optionalDependencies", "peerDependencies", "bin", "engines", "os", "cpu"]
        entry = {key: meta[key] for key in keep if key in meta}
        entry["dist"] = {
            "tarball": f"https://registry.npmjs.org/{file}",
            "integrity": integrity,
            "shasum": hashlib.sha1(data).hexdigest(),
        }
        packages.setdefault(name, {})[version] = entry
    if wanted:
        sys.exit(f"not fetched from the npm registry: {wanted}")
    for name, versions in packages.items():
        packument = {"name": name, "dist-tags": {"latest": max(versions)}, "versions": versions}
        put(mirror / name / ".index.json", json.dumps(packument, indent=1, sort_keys=True))
    shutil.rmtree(project / "dist")
    for name in ["package.json", "package-lock.json"]:
        shutil.copyfile(HERE / "node" / name, project / name)


def pypi(fetched, simple, files, project):
    projects = {}
    for file in sorted(fetched.iterdir()):
        data = file.read_bytes()
        name = re.sub(r"[-_.]+", "-", file.name.split("-")[0]).lower()
        path = f"packages/{sha256(data)[:2]}/{sha256(data)[2:4]}/{file.name}"
        put(files / path, data)
        projects.setdefault(name, []).append(
            f'<a href="https://files.pythonhosted.org/{html.escape(path)}#sha256={sha256(data)}">{file.name}</a><br/>'
        )
        if name == "flask":
            unpack(file, project)
    for name, links in projects.items():
        head = f'<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="1.1"><title>{name}</title></head><body>'
        put(simple / "simple" / name / ".index.html", "\n".join([head, *links, "</body></html>\n"]))
    shutil.copyfile(HERE / "python/requirements.txt", project / "requirements/hashed.txt")


def crates(fetched, source, index, static, project):
    if sha256(source.read_bytes()) != CSV_SHA256:
        sys.exit("csv from the registry is another one")
    unpack(source, project)
    wanted = {}
    for crate in sorted(fetched.glob("registry/cache/*/*.crate")):
        data = crate.read_bytes()
        name, version = re.fullmatch(r"(.+?)-(\d+\.\d+\.\d+.*)\.crate", crate.name).groups()
        put(static / f"crates/{name}/{version}/download", data)
        wanted[name, version] = sha256(data)
    # What cargo keeps of the index: a head, then version and line in turn, each ended by a NUL.
    for kept in sorted(fetched.glob("registry/index/*/.cache/*/*/*")):
        lines = []
        for part in kept.read_bytes().split(b"\0"):
            if part.startswith(b'{"name"'):
                line = json.loads(part)
                if wanted.get((line["name"], line["vers"])) == line["cksum"]:
                    lines.append(part + b"\n")
                    del wanted[line["name"], line["vers"]]
        if lines:
            put(index.joinpath(*kept.parts[-3:]), b"".join(lines))
    if wanted:
        sys.exit(f"cargo's index does not have {wanted}")
    put(index / "config.json", json.dumps({"dl": "https://static.crates.io/crates", "api": "https://crates.io"}))
    shutil.copyfile(HERE / "rust/Cargo.lock", project / "Cargo.lock")


def go_sum(files):
    lines = "".join(f"{sha256(data)}  {name}\n" for name, data in sorted(files.items()))
    return "h1:" + base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()


def go(sources, mirror, project):
    sums = []
    for module, version, needs in GO_MODULES:
        root = sources / module
        mod = f"module {module}\n\ngo 1.17\n" + "".join(f"\nrequire {need}\n" for need in needs)
        files = {}
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                files[path.relative_to(root).as_posix()] = path.read_bytes()
        files["go.mod"] = mod.encode()
        at = mirror / module / "@v"
        put(at / "list", version + "\n")
        put(at / f"{version}.mod", mod)
        put(at / f"{version}.info", json.dumps({"Version": version, "Time": "2022-11-08T00:00:00Z"}))
        with zipfile.ZipFile(at / f"{version}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(files):
                info = zipfile.ZipInfo(f"{module}@{version}/{name}", (1980, 1, 1, 0, 0, 0))
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(info, files[name])
        named = {f"{module}@{version}/{name}": data for name, data in files.items()}
        sums += [f"{module} {version} {go_sum(named)}\n", f"{module} {version}/go.mod {go_sum({'go.mod': mod.encode()})}\n"]
    shutil.copytree(sources / GO_PROJECT, project)
    put(project / "go.sum", "".join(sums))


def maven(root, source, mirror, project):
    repository = root / "usr/share/maven-repo"
    for path in sorted(repository.rglob("*")):
        target = path
        for _ in range(8):
            if not target.is_symlink():
                break
            link = os.readlink(target)
            target = root / link.lstrip("/") if link.startswith("/") else target.parent / link
        target = pathlib.Path(os.path.normpath(target))
        if target.is_file() and path.suffix in [".pom", ".jar"]:
            data = target.read_bytes()
            at = mirror / "maven2" / path.relative_to(repository)
            put(at, data)
            put(at.with_name(at.name + ".sha1"), hashlib.sha1(data).hexdigest())
            put(at.with_name(at.name + ".md5"), hashlib.md5(data).hexdigest())
    unpack(source, project)
    shutil.copyfile(HERE / "java/pom.xml", project / "pom.xml")


def debian(debs, mirror):
    """A suite of its own with these packages: its Release file is not signed."""
    stanzas, architecture = [], subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    for deb in debs:
        data = deb.read_bytes()
        name = re.sub(r"%3a", ":", deb.name)
        path = f"pool/main/{name[:4] if name.startswith('lib') else name[0]}/{name.replace(':', '-')}"
        put(mirror / "debian" / path, data)
        control = subprocess.check_output(["dpkg-deb", "-f", deb], text=True).strip()
        stanzas.append(f"{control}\nFilename: {path}\nSize: {len(data)}\nSHA256: {sha256(data)}\n")
    packages = "\n".join(stanzas).encode()
    of_suite = {
        f"main/binary-{architecture}/Packages": packages,
        f"main/binary-{architecture}/Packages.gz": gzip.compress(packages, mtime=0),
    }
    lines = [f" {sha256(data)} {len(data)} {name}" for name, data in of_suite.items()]
    release = f"Origin: tests\nSuite: bookworm\nCodename: bookworm\nArchitectures: {architecture}\nComponents: main\n"
    release += "Date: Sat, 01 Jun 2024 00:00:00 UTC\nSHA256:\n" + "\n".join(lines) + "\n"
    suite = mirror / "debian/dists/bookworm"
    put(suite / "Release", release)
    for name, data in of_suite.items():
        put(suite / name, data)


def cc(repository, project):
    project.mkdir(parents=True)
    archive = subprocess.Popen(["git", "--git-dir", repository, "archive", "main"], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", project], stdin=archive.stdout, check=True)
    if archive.wait() != 0:
        sys.exit(f"{repository} cannot be read")
    shutil.rmtree(project / "debian")
    shutil.copyfile(HERE / "cc/fetch-zlib", project / "fetch-zlib")
    (project / "fetch-zlib").chmod(0o755)


def main():
    fetched, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    mirror, projects = out / "mirror", out / "projects"
    npm(fetched / "npm", mirror / "registry.npmjs.org", projects / "node")
    pypi(fetched / "pypi", mirror / "pypi.org", mirror / "files.pythonhosted.org", projects / "python")
    crates(fetched / "cargo", fetched / "csv-1.3.0.crate", mirror / "index.crates.io", mirror / "static.crates.io", projects / "rust")
    go(fetched / "root/usr/share/gocode/src", mirror / "proxy.golang.org", projects / "go")
    maven(fetched / "root", next(fetched.glob("commons-csv_*.orig.tar.*")), mirror / "repo.maven.apache.org", projects / "java")
    debian(sorted((fetched / "debs").glob("zlib1g*.deb")), mirror / "deb.debian.org")
    cc(fetched / "libzip.git", projects / "cc")


main()
