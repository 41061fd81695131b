const url = document.getElementById("swagger-ui").dataset.url;
SwaggerUIBundle({ url, dom_id: "#swagger-ui", deepLinking: true });
