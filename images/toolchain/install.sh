#!/bin/sh
# Runs as root in a container of the base and makes it a toolchain's image. $1 is a directory: with debs/ in it the
# packages are there already and there is no network; without, apt fetches those named after it.
set -eu
given=$1
shift
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
options="--yes --no-install-recommends -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 -o DPkg::Options::=--force-unsafe-io"

# A package may want to start a service; a container being built has none.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
# Manual pages are left out, but some packages need their directories.
mkdir -p /usr/share/man/man1 /usr/share/man/man7
if [ -d "$given/debs" ]; then
    # shellcheck disable=SC2086
    apt-get $options install "$given"/debs/*.deb
else
    backports=/etc/apt/sources.list.d/hotcell-backports.sources
    . /etc/os-release
    sed "s/^Suites:.*/Suites: $VERSION_CODENAME-backports/" /etc/apt/sources.list.d/debian.sources |
        awk 'BEGIN { RS = ""; ORS = "\n\n" } NR == 1' >"$backports"
    apt-get -o APT::Sandbox::User=root update
    # shellcheck disable=SC2086,SC2046
    apt-get $options install $(printf '%s ' "$@" | sed "s,/backports,/$VERSION_CODENAME-backports,g")
    rm -f "$backports"
fi
rm -f /usr/sbin/policy-rc.d

# Made by hotcell on this machine, where the base has it not: see ../README.md.
if [ -e "$given/rootfs.tar" ]; then
    tar --numeric-owner -C / -xf "$given/rootfs.tar"
fi
if command -v corepack >/dev/null; then
    corepack enable --install-directory /usr/local/bin
fi

# What the toolchain's own recipe does at the end; for most it is empty.
. "$given/finish.sh"

# Mount points of a cell.
mkdir -p /.hotcell /.hotcell-agent /workspace /home/agent
: >>/.hotcell-init
chmod 755 /.hotcell-init

# Nothing in a cell changes its user; nothing tells about the machine that built it.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/lib/dpkg/*-old
find /var/log -type f -delete
rm -rf /tmp/hotcell ~root/.cache ~root/.npm
