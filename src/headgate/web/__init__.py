"""HTTP, thinly: ASGI in, the service, ASGI out."""
