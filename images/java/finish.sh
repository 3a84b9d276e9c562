# The launchers of Maven and Gradle follow the link that they are started by with `ls -l`, which Debian 12's coreutils
# and its gVisor cannot do together (see README.md). Started by their own paths they need not.
for program in /usr/share/maven/bin/mvn /usr/share/gradle/bin/gradle; do
    own=/usr/local/bin/${program##*/}
    printf '#!/bin/sh\nexec %s "$@"\n' "$program" >"$own"
    chmod 755 "$own"
done
