"""Token and TLS of a master: what is half done, unreadable or unfit ends the start with one sentence."""

import logging
import ssl
from pathlib import Path

import pytest

from umbp_connectors.master.security import Security, load
from umbp_connectors.master.settings import resolve
from umbp_core.errors import ConfigError

CERTS = Path(__file__).resolve().parents[1] / "certs"
CERT, KEY, CA = str(CERTS / "server.pem"), str(CERTS / "server.key"), str(CERTS / "ca.pem")


def loaded(**options: object) -> Security:
    return load(resolve(options, {}).config)


def refused(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(**options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def secret(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_nothing_is_asked_by_default() -> None:
    assert loaded() == Security(b"", None)
    assert loaded().open


def test_token_comes_from_a_file_or_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert loaded(token_file=str(secret(tmp_path, b"s3cret\n"))) == Security(b"s3cret", None)
    assert load(resolve({}, {"UMBP_MASTER_TOKEN": "s3cret"}).config).token == b"s3cret"
    assert not loaded(token="s3cret").open
    assert caplog.text == ""


def test_a_token_that_others_may_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(token_file=str(secret(tmp_path, b"s3cret", 0o644)))
    assert "can be read by others: chmod 600" in caplog.text


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"\xff\xfe", b"x" * 5000, b"line\nline"])
def test_a_token_that_cannot_be_sent_is_refused(tmp_path: Path, content: bytes) -> None:
    path = secret(tmp_path, content)
    text = refused(token_file=str(path))
    assert text.startswith(f"token_file {path} ")


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert (
        refused(token_file=str(tmp_path / "x"))
        == f"token_file {tmp_path / 'x'} cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("options", "given", "missing"),
    [
        ({"tls_cert": CERT}, "tls_cert", "tls_key"),
        ({"tls_key": KEY}, "tls_key", "tls_cert"),
        ({"tls_client_ca": CA}, "tls_client_ca", "tls_cert and tls_key"),
        ({"tls_cert": CERT, "tls_client_ca": CA}, "tls_cert and tls_client_ca", "tls_key"),
    ],
)
def test_half_configured_tls_is_refused(options: dict[str, str], given: str, missing: str) -> None:
    assert f"TLS is half configured: {given} without {missing};" in refused(**options)


def test_tls_and_mutual_tls() -> None:
    one_sided = loaded(tls_cert=CERT, tls_key=KEY)
    assert one_sided.tls is not None
    assert one_sided.tls.certificate.startswith(b"-----BEGIN CERTIFICATE")
    assert one_sided.tls.context.verify_mode is ssl.CERT_NONE
    assert one_sided.open
    mutual = loaded(tls_cert=CERT, tls_key=KEY, tls_client_ca=CA)
    assert mutual.tls is not None
    assert mutual.tls.client_ca is not None
    assert mutual.tls.context.verify_mode is ssl.CERT_REQUIRED
    assert not mutual.open


ENCRYPTED = """-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-256-CBC,00112233445566778899AABBCCDDEEFF

AAAA
-----END EC PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tls_key": str(CERTS / "client.key")}, "cannot be used together"),
        ({"tls_cert": KEY}, "cannot be used together"),
        ({"tls_cert": "/no/such.pem"}, "tls_cert /no/such.pem cannot be read"),
        ({"tls_client_ca": KEY}, "holds no certificate"),
        ({"tls_client_ca": "/no/such.pem"}, "tls_client_ca /no/such.pem cannot be read"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(changes: dict[str, str], sentence: str) -> None:
    assert sentence in refused(**({"tls_cert": CERT, "tls_key": KEY} | changes))


def test_an_encrypted_key_asks_nobody_for_its_pass_phrase(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(ENCRYPTED, encoding="ascii")
    assert "the key is encrypted" in refused(tls_cert=CERT, tls_key=str(path))
