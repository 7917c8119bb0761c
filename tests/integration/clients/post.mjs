// Post a photo in each of the three forms, with Node's built-in fetch as it is: node post.mjs URL PHOTO
import { readFile } from "node:fs/promises";

const [url, path] = process.argv.slice(2);
const photo = await readFile(path);

async function post(form, body, headers = {}) {
  const answer = await fetch(url, { method: "POST", body, headers });
  console.log(JSON.stringify({ form, status: answer.status, body: await answer.json() }));
}

await post("raw", new Blob([photo], { type: "image/jpeg" }));
const multipart = new FormData();
multipart.append("images", new Blob([photo], { type: "image/jpeg" }), "photo.jpg");
await post("multipart", multipart);
const json = JSON.stringify({ images: [photo.toString("base64")] });
await post("json", json, { "Content-Type": "application/json" });
