#!/usr/bin/env bash
# Make pairs on a Ray cluster through its job server, and follow the log. Submitting it again resumes.
#
#   ray-job.sh http://HEAD:8265 /shared/configs/imagenet64.toml --set pairs.draws=4
#
# The config and the artifacts lie on a file system that all nodes share: see docs/ray.md.
set -euo pipefail

[[ $# -ge 2 ]] || { echo "usage: $0 JOB_SERVER CONFIG [nfm's options]" >&2; exit 2; }
server=$1 config=$2
shift 2
artifacts=${NFM_ARTIFACTS:-/shared/artifacts}

exec ray job submit --address "$server" \
    --runtime-env-json "{\"env_vars\": {\"NFM_ARTIFACTS\": \"$artifacts\"}}" \
    -- nfm run pairs -c "$config" --set pairs.executor=ray "$@"
