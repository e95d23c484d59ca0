"""What a provider's TLS settings come to: whom we trust, and who we are."""

import ssl
from pathlib import Path

from headgate.config import ConfigError, ProviderSettings


def tls_context(key: str, settings: ProviderSettings) -> ssl.SSLContext | None:
    """None where the system's authorities are to be trusted and we show no certificate of our own.

    Certificates are always verified. ConfigError naming the setting (under `key`), the file and the problem.
    """
    own, secret = settings.client_cert_file, settings.client_key_file
    if secret and not own:
        raise ConfigError(f"{key}.client_key_file: belongs to client_cert_file, which is not set")
    if not settings.ca_file and not own:
        return None
    context = ssl.create_default_context() if not settings.ca_file else _trusting(key, settings.ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if own:
        _show(context, key, own, secret)
    return context


def _trusting(key: str, file: str) -> ssl.SSLContext:
    _read(f"{key}.ca_file", file)
    try:
        return ssl.create_default_context(cafile=file)
    except ssl.SSLError as error:
        raise ConfigError(f"{key}.ca_file: {file} holds no certificate in PEM format") from error


def _show(context: ssl.SSLContext, key: str, own: str, secret: str) -> None:
    _read(f"{key}.client_cert_file", own)
    if secret:
        _read(f"{key}.client_key_file", secret)
    try:
        # An empty password: an encrypted key is an error, not a question on the terminal.
        context.load_cert_chain(own, secret or None, password="")
    except (ssl.SSLError, ValueError) as error:
        if "KEY_VALUES_MISMATCH" in str(error):
            raise ConfigError(
                f"{key}.client_key_file: {secret or own} holds the key of another certificate"
            ) from error
        where = f"{own} and {secret} hold" if secret else f"{own} holds"
        raise ConfigError(
            f"{key}.client_cert_file: {where} no certificate and unencrypted key in PEM format"
        ) from error


def _read(key: str, file: str) -> None:
    try:
        with Path(file).open("rb"):
            pass
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "cannot be read"
        raise ConfigError(f"{key}: {file}: {reason}") from error
