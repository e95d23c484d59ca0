"""What a request costs in the gateway, next to nginx on the same core. `make bench` runs it; README.md explains."""
