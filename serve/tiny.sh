#!/bin/sh
# Serves the small world's student on this machine until Ctrl-C; says where, and how to ask it.
set -eu
cd "$(dirname "$0")/.."
url=http://127.0.0.1:8000
# Requests are read in whole, under limits, in the proxy: before they take a replica's slot.
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=raydistill.service.guard.in_proxy
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
serve run serve/tiny.yaml &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server' INT TERM EXIT
until curl --silent --fail --output /dev/null $url/ready; do
  kill -0 $server
  sleep 1
done
cat <<END

The page: $url      What may be asked for: $url/v1/models

  curl $url/v1/videos/sync -o runs/serve/clip.mp4 -H 'content-type: application/json' \\
    -d '{"prompt": "a red circle moves slowly left over a plain background", "num_inference_steps": 4}'

END
wait $server
