#!/bin/sh
# Last step of mmdebstrap, run on the host. $1 is the directory that becomes the image; HOTCELL_SOURCES is a file
# with the public package sources. Takes out what tells about the machine that built it (mirror, proxy, names,
# logs) and what differs from run to run.
set -eu
root=$1
test -n "$root" && test "$root" != / && test -d "$root/etc/apt"

rm -f "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/* "$root"/etc/apt/apt.conf.d/00hotcell-host
rm -rf "$root"/etc/apt/auth.conf "$root"/etc/apt/auth.conf.d/*
# Keys of other archives which the building machine trusts; Debian's own come with debian-archive-keyring.
rm -f "$root"/etc/apt/trusted.gpg "$root"/etc/apt/keyrings/*
cp "$HOTCELL_SOURCES" "$root/etc/apt/sources.list.d/debian.sources"
chmod 0644 "$root/etc/apt/sources.list.d/debian.sources"

# Nothing in a cell changes its user.
find "$root" -xdev -type f -perm /6000 -exec chmod a-s {} +

# The engine writes these into each container.
for name in resolv.conf hostname hosts; do
    rm -f "$root/etc/$name"
    : > "$root/etc/$name"
    chmod 0644 "$root/etc/$name"
done

rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old "$root"/var/cache/ldconfig/*
find "$root/var/log" -type f -delete
rm -f "$root"/var/lib/dpkg/*-old "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
find "$root/usr/lib/python3" "$root"/usr/lib/python3.* -name __pycache__ -type d -prune -exec rm -rf {} +
