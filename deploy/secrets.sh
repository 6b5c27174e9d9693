#!/bin/sh
# Makes the passwords of a deployment: adds to FILE (by default .env beside docker-compose.yml) the
# ones it lacks, and changes none that is there.
#
#   deploy/secrets.sh [FILE]
set -eu
umask 077
file=${1:-$(dirname "$0")/../.env}

# A letter first: nats-server takes what looks like a number for one. Only letters and digits: they
# mean nothing in a URL, in a shell, or to compose.
password() {
    printf 'p%s' "$(LC_ALL=C tr -dc 'A-Za-z0-9' < /dev/urandom | head -c 32)"
}

touch "$file"
chmod 600 "$file"
if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then
    echo >> "$file" # its last line had no end
fi
for name in \
    BANYAN_NATS_PASSWORD_GATEWAY \
    BANYAN_NATS_PASSWORD_PREDICTOR \
    BANYAN_NATS_PASSWORD_SCHEDULER \
    BANYAN_NATS_PASSWORD_PREFILL \
    BANYAN_NATS_PASSWORD_DECODE \
    BANYAN_NATS_PASSWORD_KVSTORE \
    BANYAN_NATS_PASSWORD_PLACER \
    BANYAN_NATS_PASSWORD_SUPERVISOR \
    BANYAN_NATS_PASSWORD_CLI \
    BANYAN_POSTGRES_PASSWORD; do
    if ! grep -q "^$name=." "$file"; then
        echo "$name=$(password)" >> "$file"
    fi
done
