"""What the gateway does with a request. Start reading at complete.py."""
