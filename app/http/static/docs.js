// Swagger UI over our own openapi.json; in a file of its own because the page allows no inline script.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null, presets: [SwaggerUIBundle.presets.apis] });
