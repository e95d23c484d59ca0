"""Which addresses a URL that a client chose may lead to: those of the public internet alone.

Source: the IANA special-purpose address registries, and where clouds keep what their machines may know.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address

_NOT_PUBLIC_4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # between a carrier and its customers; also the metadata of Alibaba's machines
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's machines reach their host there, although the address is public
        "169.254.0.0/16",  # this link: the metadata of most clouds' machines
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)

_GLOBAL_6 = IPv6Network("2000::/3")
"""All that was ever given out. Outside lie ::1, IPv4 written as IPv6, NAT64, unique local, link-local and multicast."""

_NOT_PUBLIC_6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo among others
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
    )
)


def is_public(address: Address) -> bool:
    """False for what is private, local or reserved, or holds an IPv4 address that something on the way would unpack."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _GLOBAL_6 and not any(address in network for network in _NOT_PUBLIC_6)


def parsed(text: str) -> Address | None:
    """The address, where the text is one as everybody writes it; no zone."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id else address
