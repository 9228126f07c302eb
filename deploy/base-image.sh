#!/usr/bin/env bash
# Make a base image without any image registry: Debian's own Python in a minimal system, straight from the Debian mirror.
#
#   deploy/base-image.sh [NAME]        NAME is python-local:3.11 unless given
#   BASE_IMAGE=python-local:3.11 docker compose -f deploy/compose.yaml build
#
# Needs root, debootstrap and a running engine. MIRROR chooses another Debian mirror.
set -euo pipefail

name=${1:-python-local:3.11}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/usr/share/man
tar --directory "$root" --numeric-owner --exclude './dev/*' --create . | docker import --change 'CMD ["python3"]' - "$name"
