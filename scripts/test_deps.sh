#!/usr/bin/env bash
# Installs what the tests need beside Python: programs from Debian, and ollama-js from the npm registry.
# With `bench`, what `make bench-routing` needs instead: the balancers to compare with.
# Does nothing, quickly, where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

# Each program with the packages that bring it.
needs="
cc:gcc,libc6-dev
curl:curl
ip:iproute2
nginx:nginx
node:nodejs
npm:npm
systemd-analyze:systemd
"
what="tests"
if [ "${1-}" = bench ]; then
    needs="haproxy:haproxy nginx:nginx"
    what="benchmark"
fi

PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps nginx and ip, which is not on every user's PATH
missing="" packages=""
for need in $needs; do
    command -v "${need%%:*}" >/dev/null && continue
    missing+=" ${need%%:*}" packages+=" ${need#*:}"
done
packages=${packages//,/ }

cannot() {
    echo "sollol: for the $what there should be$missing, but $1; install them (on Debian: apt-get install$packages) and run this again." >&2
    exit 1
}

# Quietly; what apt-get said shows if it fails. No service is started or enabled by it.
install_packages() {
    policy=/usr/sbin/policy-rc.d
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    if [ ! -e $policy ]; then
        trap 'rm -f "$log"; $as_root rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy >/dev/null
        $as_root chmod 755 $policy
    fi
    if ! {
        $as_root apt-get -qq update &&
            $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"
    } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        cannot "apt-get failed as shown above"
    fi
    for service in nginx haproxy; do
        case " $* " in *" $service "*) $as_root systemctl disable --quiet $service 2>/dev/null || true ;; esac
    done
}

if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || cannot "there is no apt-get to install them with"
    as_root=""
    if [ "$(id -u)" != 0 ]; then
        as_root="sudo -n"
        $as_root true 2>/dev/null || cannot "this user may not install Debian packages"
    fi
    echo "sollol: installing$packages for the $what"
    # shellcheck disable=SC2086 # one word per package
    install_packages $packages
fi

[ "$what" = tests ] || exit 0

js=tests/e2e/js
if [ ! $js/node_modules/.package-lock.json -nt $js/package-lock.json ]; then
    echo "sollol: installing ollama-js into $js/node_modules"
    npm ci --prefix $js --silent || { echo "sollol: npm could not install the packages of $js/package-lock.json." >&2; exit 1; }
    touch $js/node_modules/.package-lock.json
fi
