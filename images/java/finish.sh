# Maven's launcher follows the link that it is started by with `ls -l`, which Debian 12's coreutils and its gVisor cannot
# do together (see README.md). Started by its own path it need not.
printf '#!/bin/sh\nexec /usr/share/maven/bin/mvn "$@"\n' >/usr/local/bin/mvn
chmod 755 /usr/local/bin/mvn
