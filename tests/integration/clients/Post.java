import static java.net.http.HttpRequest.BodyPublishers.concat;
import static java.net.http.HttpRequest.BodyPublishers.ofFile;
import static java.net.http.HttpRequest.BodyPublishers.ofString;

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;

/** Post a photo in each of the three forms, with Java's own client as it is: java Post.java URL PHOTO. */
class Post {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws Exception {
        var url = URI.create(arguments[0]);
        var photo = Path.of(arguments[1]);
        post(url, "raw", "image/jpeg", ofFile(photo));
        var part = "--boundary\r\nContent-Disposition: form-data; name=\"images\"; filename=\"photo.jpg\"\r\n\r\n";
        var multipart = concat(ofString(part), ofFile(photo), ofString("\r\n--boundary--\r\n"));
        post(url, "multipart", "multipart/form-data; boundary=boundary", multipart);
        var base64 = Base64.getEncoder().encodeToString(Files.readAllBytes(photo));
        post(url, "json", "application/json", ofString("{\"images\": [\"" + base64 + "\"]}"));
    }

    private static void post(URI url, String form, String contentType, BodyPublisher body) throws Exception {
        var request = HttpRequest.newBuilder(url).header("Content-Type", contentType).POST(body).build();
        var answer = CLIENT.send(request, BodyHandlers.ofString());
        System.out.printf("{\"form\": \"%s\", \"status\": %d, \"body\": %s}%n", form, answer.statusCode(), answer.body());
    }
}
