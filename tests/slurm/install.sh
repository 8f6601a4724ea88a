#!/usr/bin/env bash
# Debian's SLURM and munge, for tests/slurm, without starting the services that come with them.
set -euo pipefail
needed=(munged slurmctld slurmd sbatch)
if command -v "${needed[@]}" >/dev/null && [[ $(command -v "${needed[@]}" | wc -l) == "${#needed[@]}" ]]; then
    [[ $(id -u) == 0 ]] && exit 0
fi
if [[ $(id -u) != 0 ]]; then
    echo "error: make test-slurm starts SLURM's daemons, which need root: run it in a container, or with sudo" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "error: make test-slurm needs ${needed[*]} and installs them with apt-get only: install SLURM and munge" >&2
    exit 1
fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
