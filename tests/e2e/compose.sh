#!/usr/bin/env bash
# The suite in containers, on the Docker engine of this host, without a GPU: builds all images,
# brings the CPU variant up, and does to it what happens to a deployment. Takes 7 to 15 minutes
# and 15 GB on two cores the first time.
#
#   tests/e2e/compose.sh
#
# Exit codes: 0 passed, 1 failed, 77 not run, because something that it needs is not here.
# Where the official images cannot be pulled, stand-ins are built from Debian's packages and PyPI
# (tests/e2e/images); this needs root and debootstrap.
#
#   BANYAN_E2E_DIR        where it works, kept if given; by default a new folder, removed at the end
#   BANYAN_E2E_STAND_INS  1: do not try to pull anything
#   BANYAN_E2E_MIRROR     a mirror of Debian
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
images=$root/tests/e2e/images
client=$root/tests/e2e/compose_client.py
services=(gateway predictor scheduler prefill decode kvstore placer)
max_gateway_mb=450

step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }
skip() { printf 'NOT RUN: %s\n' "$*" >&2; exit 77; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# ---- What there is

timeout 20 docker info > /dev/null 2>&1 ||
    skip "no Docker engine answers: install one (Debian: docker.io docker-compose) and start dockerd"

# A client that can build: with the buildx plugin, or so old that it can do without.
find_builder() {
    local candidate version
    for candidate in $(type -aP docker); do
        version=$("$candidate" version --format '{{.Client.Version}}' 2> /dev/null) || continue
        if [ "${version%%.*}" -lt 23 ] || "$candidate" buildx version > /dev/null 2>&1; then
            PATH=$(dirname "$candidate"):$PATH
            export DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1
            return
        fi
    done
    export DOCKER_BUILDKIT=0 # slower, and one target after the other
}
find_builder

cd "$root"
if [ -n "${BANYAN_E2E_DIR:-}" ]; then
    mkdir -p "$BANYAN_E2E_DIR"
    work=$(cd "$BANYAN_E2E_DIR" && pwd)
else
    work=$(mktemp -d)
fi

compose_files=("$root/docker-compose.yml" "$root/docker-compose.cpu.yml")
compose_version=$(docker compose version --short 2> /dev/null || true)
compose_version=${compose_version#v}
if [ -n "$compose_version" ] &&
    [ "$(printf '%s\n' 2.24.4 "$compose_version" | sort -V | head -n 1)" = 2.24.4 ]; then
    compose_program=(docker compose)
elif [ -n "$(type -P docker-compose)" ]; then
    # Version 1, or an early 2: both lack `!reset`.
    compose_program=(docker-compose)
    python=
    for candidate in $(type -aP python3) /usr/bin/python3; do
        "$candidate" -c 'import yaml' 2> /dev/null && python=$candidate && break
    done
    [ -n "$python" ] || skip "docker-compose is older than 2.24, which needs PyYAML here"
    "$python" "$images/compose_v1.py" "$work" docker-compose.yml docker-compose.cpu.yml
    compose_files=("$work/docker-compose.yml" "$work/docker-compose.cpu.yml")
else
    skip "no Docker Compose (2.24 or later, or docker-compose)"
fi
for program in python3 tar; do
    type -P "$program" > /dev/null || skip "$program is missing"
done

project=banyan-e2e-$$
env_file=$work/env
compose() { # SECONDS COMMAND...: no longer than that
    timeout "$1" "${compose_program[@]}" --project-name "$project" --project-directory "$root" \
        --env-file "$env_file" --file "${compose_files[0]}" --file "${compose_files[1]}" "${@:2}"
}
containers() { compose 30 ps --all --quiet "$1"; }

pip_source=
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    if [ -f "$env_file" ]; then
        if [ "$code" -ne 0 ] && [ "$code" -ne 77 ]; then
            printf '\n-- the last lines of every container\n' >&2
            compose 60 logs --no-color --tail=15 >&2 || true
        fi
        compose 120 down --volumes --remove-orphans --timeout 20 > "$work/down.log" 2>&1 ||
            { cat "$work/down.log" >&2; [ "$code" -ne 0 ] || code=1; }
    fi
    [ -z "$pip_source" ] || kill "$pip_source" 2> /dev/null || true
    [ -n "${BANYAN_E2E_DIR:-}" ] || rm -rf "$work"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# ---- The images that ours are made of

build_args=()
for variable in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
    [ -z "${!variable:-}" ] || build_args+=(--build-arg "$variable")
done

make_stand_ins() {
    step "stand-ins for the official images"
    [ "$(id -u)" = 0 ] || skip "images cannot be pulled, and making stand-ins needs root"
    type -P debootstrap > /dev/null || skip "images cannot be pulled, and debootstrap is missing"
    local mirror=${BANYAN_E2E_MIRROR:-http://deb.debian.org/debian} tree=$work/debian target
    if ! docker image inspect banyan-e2e/base > /dev/null 2>&1; then
        timeout 900 debootstrap --variant=minbase --include=python3,ca-certificates bookworm \
            "$tree" "$mirror" > "$work/debootstrap.log" 2>&1 ||
            { tail -n 20 "$work/debootstrap.log" >&2; skip "debootstrap failed"; }
        tar -C "$tree" -c --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' \
            --exclude='./usr/share/locale/*' . | docker import - banyan-e2e/base > /dev/null
        rm -rf "$tree"
    fi
    mkdir -p "$work/context"
    cp "$images/Dockerfile" "$images/postgres.sh" "$work/context"
    python3 "$images/pip_source.py" "$work/context" 2> "$work/pip_source.log" &
    pip_source=$!
    local seconds=0
    until [ -s "$work/context/ca-certificates.crt" ]; do
        seconds=$((seconds + 1))
        [ "$seconds" -lt 20 ] || fail "pip_source.py wrote nothing: $(cat "$work/pip_source.log")"
        sleep 1
    done
    for target in build nats postgres haproxy; do
        timeout 900 docker build --network host "${build_args[@]}" \
            --build-arg BASE=banyan-e2e/base --target "$target" --tag "banyan-e2e/$target" \
            "$work/context" > "$work/build-$target.log" 2>&1 ||
            { tail -n 30 "$work/build-$target.log" >&2; fail "the stand-in for $target"; }
    done
    export BANYAN_BASE_IMAGE=banyan-e2e/base BANYAN_BUILD_BASE_IMAGE=banyan-e2e/build
    export BANYAN_WORKER_BASE_IMAGE=banyan-e2e/base BANYAN_NATS_IMAGE=banyan-e2e/nats
    export BANYAN_POSTGRES_IMAGE=banyan-e2e/postgres BANYAN_HAPROXY_IMAGE=banyan-e2e/haproxy
    # From where pip takes everything else; whether that was a CPU build is looked at below.
    export BANYAN_TORCH_INDEX=${BANYAN_TORCH_INDEX-} BANYAN_BUILD_NETWORK=host
}

needs=(python:3.11-slim-bookworm python:3.11-bookworm nats:2-alpine postgres:17-alpine
    haproxy:3.2-alpine)
if [ -n "${BANYAN_E2E_STAND_INS:-}" ]; then
    make_stand_ins
else
    for image in "${needs[@]}"; do
        docker image inspect "$image" > /dev/null 2>&1 ||
            timeout 300 docker pull --quiet "$image" > "$work/pull.log" 2>&1 ||
            { echo "$image cannot be pulled: $(tail -n 1 "$work/pull.log")"; make_stand_ins; break; }
    done
fi

# ---- Ours

export BANYAN_IMAGES=banyan-e2e BANYAN_TAG=test
BANYAN_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export BANYAN_PORT
export UCX_LOG_LEVEL=info UCX_PROTO_INFO=y
"$root/deploy/secrets.sh" "$env_file"
compose 30 config --quiet

step "images"
for service in "${services[@]}" cli; do
    began=$SECONDS
    compose 1800 build "$service" > "$work/build-$service.log" 2>&1 ||
        { tail -n 40 "$work/build-$service.log" >&2; fail "the image of $service"; }
    tag=$BANYAN_TAG
    case $service in prefill | decode) tag=$tag-cpu ;; esac
    size_mb=$(($(docker image inspect --format '{{.Size}}' "$BANYAN_IMAGES/$service:$tag") / 1000000))
    printf '%-10s %5d MB   built in %d s\n' "$service" "$size_mb" $((SECONDS - began))
    if [ "$service" = gateway ] && [ "$size_mb" -gt "$max_gateway_mb" ]; then
        fail "the gateway's image has $size_mb MB, more than $max_gateway_mb"
    fi
    # Nobody is root, nothing of the build is left.
    docker run --rm --entrypoint sh "$BANYAN_IMAGES/$service:$tag" -c '
        test "$(id -u)" = 10001 || { echo "runs as $(id)"; exit 1; }
        python -c "import importlib.util as u, sys; sys.exit(u.find_spec(\"pip\") is not None)" ||
            { echo "has pip"; exit 1; }
        ! command -v gcc || { echo "has a compiler"; exit 1; }' || fail "the image of $service"
done
docker run --rm --entrypoint python "$BANYAN_IMAGES/gateway:$BANYAN_TAG" -c \
    'import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ("torch", "numpy")))' ||
    fail "the gateway's image has torch or numpy"
docker run --rm --entrypoint python "$BANYAN_IMAGES/decode:$BANYAN_TAG-cpu" -c '
import torch
from shared.engine.native.library import load_library
library = load_library()
print(f"decode: torch {torch.__version__}, kernels {library and library.name}")
raise SystemExit(library is None or torch.version.cuda is not None)' ||
    fail "the image of decode lacks the kernels, or has a torch for CUDA"

# ---- Up

url=http://127.0.0.1:$BANYAN_PORT
gateway_python() { # INDEX ARGUMENTS...: the client inside a gateway's own container
    local index=$1
    shift
    compose 180 exec -T --index="$index" gateway "$@"
}
start() { # what the two counts are in the end
    compose 400 up -d --no-build --scale "decode=$1" --scale "gateway=$2" > "$work/up.log" 2>&1 ||
        { tail -n 30 "$work/up.log" >&2; fail "docker compose up"; }
}
healthy() { # SERVICE COUNT SECONDS: until so many of its containers are healthy
    local deadline=$((SECONDS + $3)) ids count
    while :; do
        ids=$(containers "$1")
        # shellcheck disable=SC2086
        count=$(docker inspect --format '{{.State.Health.Status}}' $ids 2> /dev/null |
            grep -c '^healthy$' || true)
        [ "$count" -lt "$2" ] || return 0
        [ "$SECONDS" -lt "$deadline" ] || fail "$count of $2 $1 are healthy after $3 s"
        sleep 1
    done
}

step "up: one of each"
start 1 1
python3 "$client" wait "$url" 180 || fail "not ready"
since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
python3 "$client" chat "$url" || fail "no answer"
for service in "${services[@]}" proxy nats postgres; do healthy "$service" 1 120; done
compose 30 ps

step "banyan status, in a container of its own"
compose 120 run --rm -T cli status || fail "banyan status"

step "how KV goes from one container to another"
# UCX says with what it has connected two workers; before $since it has only tried itself out.
for service in prefill decode kvstore; do
    lanes=$(docker logs --since "$since" "$(containers "$service")" 2>&1 |
        grep -E 'cfg#[0-9]+ [a-z_]+\(' | grep -oE 'tag\([^)]*\)' | sort | uniq -c | xargs || true)
    printf '%-8s UCX connected by %s\n' "$service" "${lanes:-none}"
    [[ "$lanes" == *sysv/memory* && "$lanes" != *tcp* ]] ||
        fail "UCX does not use shared memory between the containers of the data plane"
done

step "two decode workers and two gateways"
start 2 2
healthy decode 2 180
healthy gateway 2 60
for index in 1 2; do
    gateway_python "$index" python - chat http://127.0.0.1:8000 < "$client" ||
        fail "no answer from gateway $index"
done
python3 "$client" streams "$url" 8 100 || fail "streams through the proxy"
for index in 1 2; do
    accepted=$(gateway_python "$index" python /opt/banyan/deploy/healthcheck.py /metrics |
        awk '$1 == "banyan_gateway_accepted_requests_total" { print int($2) }')
    echo "gateway $index has had $accepted requests"
    # One of them is its own; more came through the proxy.
    [ "${accepted:-0}" -gt 1 ] || fail "the proxy has given gateway $index no request"
done

step "a decode container is killed while it answers"
mapfile -t found < <(containers decode)
python3 "$client" streams "$url" 8 1000 docker kill "${found[0]}" || fail "an answer was lost"
start 2 2
healthy decode 2 180

step "a gateway is stopped while others come in"
mapfile -t found < <(containers gateway)
victim=${found[-1]}
python3 "$client" streams "$url" 6 800 docker stop --time 60 "$victim" ||
    fail "an answer was lost with the gateway that was to finish it"
code=$(docker inspect --format '{{.State.ExitCode}}' "$victim")
[ "$code" = 0 ] || fail "the gateway ended with $code"
python3 "$client" chat "$url" || fail "no answer through the other gateway"

step "NATS is restarted"
timeout 60 docker restart --time 10 "$(containers nats)" > /dev/null
python3 "$client" wait "$url" 60 || fail "not ready again"
python3 "$client" chat "$url" || fail "no answer"

step "down"
compose 120 stop --timeout 60 > /dev/null 2>&1 || fail "docker compose stop"
for service in "${services[@]}"; do
    for container in $(containers "$service"); do
        code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
        [ "$code" = 0 ] || fail "$service ended with $code"
    done
done

step "passed"
