# What a job tries so that the next one gets other bytes: it asks for files of a registry in ways that a registry may
# answer differently, sends its own, and writes over all that package managers keep. Needs INDEX and FILE (addresses),
# OTHER (another registry's host) and CACHES (directories).
ask() {
    said=$1
    shift
    code=$(curl -sS -m 20 -o /tmp/asked -w '%{http_code}' "$@" 2>/tmp/why) || code="$code $(cat /tmp/why)"
    echo "$said: $code $(head -c 6 /tmp/asked 2>/dev/null | tr -cd 'a-z')"
    rm -f /tmp/asked
}
for at in "$INDEX" "$FILE"; do
    ask host -H "Host: $OTHER" "$at"
    ask forwarded -H 'X-Forwarded-Host: evil.example' -H 'X-Original-URL: /evil' -H 'Forwarded: host=evil.example' "$at"
    ask renewed -H 'Cache-Control: no-cache' -H 'X-Forwarded-Host: evil.example' -H 'Cookie: evil=1' "$at"
    ask part -H 'Range: bytes=0-5' "$at"
    ask accept -H 'Accept: application/evil' "$at"
    ask own -H 'Authorization: Bearer evil' "$at"
    ask query "$at?evil=1"
    ask content -X GET --data evil "$at"
    ask overridden -H 'X-HTTP-Method-Override: PUT' "$at"
    ask put -X PUT --data poison "$at"
    ask post --data poison "$at"
    ask delete -X DELETE "$at"
done
spoilt=0
for file in $(find $CACHES -type f); do
    chmod u+w "$(dirname "$file")" "$file" && echo poison >"$file" && spoilt=$((spoilt + 1))
done
echo "spoilt: $spoilt"
