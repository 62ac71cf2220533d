"""Certificate and key of a server that speaks HTTPS: which files they are, and whether they can be used, before anything is loaded.

The encryption itself is the standard library's, at uvicorn's hands.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CERTFILE_VARIABLE, KEYFILE_VARIABLE, PASSWORD_VARIABLE = "SSL_CERTFILE", "SSL_KEYFILE", "SSL_KEYFILE_PASSWORD"
OLDEST_VERSION = ssl.TLSVersion.TLSv1_2


class TlsError(ValueError):
    """Files that cannot be used; the message names them."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; without a key file, the key stands in the certificate's."""

    certfile: str
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """Reads them. Raises TlsError."""
        for file in filter(None, (self.certfile, self.keyfile)):
            _check_readable(file)
        try:
            # An empty password, or OpenSSL would ask for one on the terminal and wait.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, self.password or "")
        except ssl.SSLError as error:
            raise TlsError(f"{self}: they cannot be used: {self._reason(error)}") from error
        except OSError as error:
            raise TlsError(f"{self}: they cannot be read: {error.strerror or error}") from error

    def __str__(self) -> str:
        return f"--ssl-certfile {self.certfile}" + (f" and --ssl-keyfile {self.keyfile}" if self.keyfile else "")

    def _reason(self, error: ssl.SSLError) -> str:
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not the certificate's"
        if "ENCRYPTED" in Path(self.keyfile or self.certfile).read_text("latin-1"):
            return f"the key is encrypted, and {PASSWORD_VARIABLE} in the environment does not open it"
        return "they are no certificate and key in PEM"


def tls_files(
    certfile: str | None, keyfile: str | None, *, from_environment: bool | None, environment: Mapping[str, str]
) -> TlsFiles | None:
    """The files of the flags, or those that the environment names; None: plain HTTP. Raises TlsError.

    from_environment: `--ssl` (LMDeploy's flag), `--no-ssl`, or None for neither.
    """
    if from_environment is False and (certfile or keyfile):
        raise TlsError("--no-ssl: it contradicts --ssl-certfile and --ssl-keyfile")
    if from_environment and not certfile and not keyfile:
        certfile, keyfile = environment.get(CERTFILE_VARIABLE), environment.get(KEYFILE_VARIABLE)
        if not certfile or not keyfile:
            message = f"--ssl: {CERTFILE_VARIABLE} and {KEYFILE_VARIABLE} in the environment must name the files; or use --ssl-certfile"
            raise TlsError(message)
    if keyfile and not certfile:
        raise TlsError("--ssl-keyfile: --ssl-certfile is needed too")
    return TlsFiles(certfile, keyfile, environment.get(PASSWORD_VARIABLE)) if certfile else None


def _check_readable(file: str) -> None:
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise TlsError(f"{file}: it cannot be read: {error.strerror or error}") from error
