#!/bin/sh
# Starts the server in the container: finds out who may use the mounted model cache, becomes that user, and reads the arguments
#   (nothing) | FLAGS | MODEL … | serve MODEL … | PROGRAM serve api_server MODEL …    (the last with any program name)
set -eu

CACHE=/root/.cache/huggingface
PORT_FILE=/run/vlm-server-port # for the health check

say() { echo "entrypoint: $*" >&2; }

warn_of_unused_gpus() {
    [ "${VLM_SERVER_VARIANT:-cpu}" = cpu ] || return 0
    case "${NVIDIA_VISIBLE_DEVICES:-none}" in none | void) [ -e /dev/nvidia0 ] || return 0 ;; esac
    say "warning: this image is built for CPU and leaves the GPUs that it sees idle; build it with --build-arg VARIANT=cu130"
}

remember_port() {
    port=23333 previous=
    for argument; do
        case "$previous" in --server-port | --server_port) port=$argument ;; esac
        case "$argument" in --server-port=* | --server_port=*) port=${argument#*=} ;; esac
        previous=$argument
    done
    { echo "$port" >"$PORT_FILE"; } 2>/dev/null || true
}

# The cache's owner where that is a user. Where it is root, the service's own user, who gets in through its group:
# what belongs to root is given to that group, and nothing changes its owner.
choose_user() {
    user=$(stat -c %u "$CACHE") group=$(stat -c %g "$CACHE")
    [ "$user" = 0 ] || return 0
    user=$(id -u vlm-server) group=$(id -g vlm-server)
    {
        find "$CACHE" -user root ! -type l ! -group "$group" -exec chgrp "$group" {} +
        find "$CACHE" -user root -type d ! -perm -2070 -exec chmod g+rwxs {} +
        find "$CACHE" -user root -type f ! -perm -040 -exec chmod g+r {} +
    } 2>/dev/null || say "warning: $CACHE cannot be opened to the server's user; a model that is not in it cannot be stored"
}

# Sets the positional parameters to those of vlm-server.
case "${1:-}" in
serve | check_env | check-env | --version) ;;
*) case "${2:-}" in
    serve | check_env | check-env) shift ;;
    *) set -- serve "$@" ;;
    esac ;;
esac

export HF_HOME="$CACHE" HOME=/var/lib/vlm-server USER=vlm-server LOGNAME=vlm-server
warn_of_unused_gpus
remember_port "$@"
if [ "$(id -u)" != 0 ]; then # the container's user was chosen by whoever started it
    exec vlm-server "$@"
fi
mkdir -p "$CACHE"
choose_user
exec setpriv --reuid="$user" --regid="$group" --clear-groups --no-new-privs -- vlm-server "$@"
