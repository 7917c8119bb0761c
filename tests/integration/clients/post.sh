#!/usr/bin/env bash
# Post a photo in each of the three forms, with curl: bash post.sh URL PHOTO [OPTIONS OF CURL]
set -euo pipefail
url=$1 photo=$2
# Without the user's own settings (-q); curl writes the status after the body, so each line is begun before it.
curl=(--silent --show-error "${@:3}" --write-out)
end=', "status": %{http_code}}\n'

echo -n '{"form": "raw", "body": '
{ echo -n '{"images": ["'; base64 <"$photo" | tr -d '\n'; echo -n '"]}'; } | curl -q \
  "${curl[@]}" "$end{\"form\": \"multipart\", \"body\": " --data-binary "@$photo" "$url" \
  --next "${curl[@]}" "$end{\"form\": \"json\", \"body\": " --form "images=@$photo" "$url" \
  --next "${curl[@]}" "$end" --header "Content-Type: application/json" --data-binary @- "$url"
