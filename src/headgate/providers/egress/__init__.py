"""Everything that leaves the gateway over HTTP, and the only code that speaks aiohttp: keys leave by this door alone.

service.py speaks to one upstream service, connect.py builds that from an operator's settings; images.py fetches what
clients name by URL, which addresses.py keeps out of private networks.
"""
