"""TLS for the listening port, with certificates that are read anew when their files change."""

import logging
from pathlib import Path

import grpc

from service.config import SettingsError

_log = logging.getLogger(__name__)


class Certificates:
    """The server's key and certificate chain, and the authority whose client certificates it takes.

    Args:
        key: PEM private key.
        chain: PEM certificate chain, the server's own first.
        client_ca: PEM of the authority that client certificates must come from (mTLS); None asks for none.

    Raises:
        SettingsError: a file cannot be read.
    """

    def __init__(self, *, key: Path, chain: Path, client_ca: Path | None) -> None:
        self._paths = [key, chain, *([client_ca] if client_ca else [])]
        self._mutual = client_ca is not None
        self._contents = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for the port. Each new connection gets what the files hold by then."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # the stubs leave out None, which gRPC takes for "as before"
            require_client_authentication=self._mutual,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each handshake, on a thread of its own; None keeps what it has."""
        try:
            contents = self._read()
        except SettingsError as error:  # a file that is being replaced: the next handshake sees the new one
            _log.warning("certificates were not reloaded: %s", error)
            return None
        if contents == self._contents:
            return None
        self._contents = contents
        _log.info("certificates reloaded")
        return self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, chain, *client_ca = self._contents
        return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca[0] if client_ca else None)

    def _read(self) -> list[bytes]:
        try:
            return [path.read_bytes() for path in self._paths]
        except OSError as error:
            raise SettingsError(f"TLS: {error.strerror}: {error.filename!r}") from None
