"""The HTTP server: OpenAI's routes, memories as resources, and a page, on top of an engine. Needs the extra `serve`."""
