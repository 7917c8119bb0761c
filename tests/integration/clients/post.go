// Post a photo in each of the three forms, with Go's default client as it is: go run post.go URL PHOTO
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"mime/multipart"
	"net/http"
	"os"
)

func main() {
	url, path := os.Args[1], os.Args[2]
	photo, err := os.ReadFile(path)
	check(err)

	file, err := os.Open(path)
	check(err)
	post(url, "raw", "image/jpeg", file) // of a length that the client does not know, so it goes in chunks

	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("images", "photo.jpg")
	check(err)
	_, err = part.Write(photo)
	check(err)
	check(writer.Close())
	post(url, "multipart", writer.FormDataContentType(), &form)

	body, err := json.Marshal(map[string][]string{"images": {base64.StdEncoding.EncodeToString(photo)}})
	check(err)
	post(url, "json", "application/json", bytes.NewReader(body))
}

func post(url, form, contentType string, body io.Reader) {
	answer, err := http.Post(url, contentType, body)
	check(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	check(err)
	fmt.Printf("{\"form\": %q, \"status\": %d, \"body\": %s}\n", form, answer.StatusCode, text)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
