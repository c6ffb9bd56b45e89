"""The client before a server that does not let everyone in: tokens, certificates, and errors that say what to do."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ghn_client import GHNClient
from ghn_client.cli.app import app
from ghn_client.errors import AuthenticationError, GhnClientError, ServerUnavailableError
from ghn_service.server.access import append_token, make_token
from ghn_service.server.app import RunningServer
from tests.server.certificates import Certificates
from tests.server.fake_predictor import fake_server
from tests.server.small_models import TINY


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's token, beside the tokens file of the server."""
    folder = tmp_path_factory.mktemp("tokens")
    token, line = make_token("alice")
    append_token(folder / "tokens", line)
    (path := folder / "alice.token").write_text(token + "\n")
    return path


@pytest.fixture(scope="module")
def server(
    certificates: Certificates, token_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    certificate, key = certificates.issue("server", "ghn.example.org", "localhost")
    settings = {"tls_certificate": certificate, "tls_key": key, "tokens": token_file.with_name("tokens")}
    with fake_server(tmp_path_factory.mktemp("server"), **settings) as running:
        yield running


def localhost(server: RunningServer) -> str:
    return server.address.replace("127.0.0.1", "localhost")


def failure(address: str, **options: Any) -> GhnClientError:
    """The error of a call."""
    with GHNClient(address, max_attempts=1, **options) as client, pytest.raises(GhnClientError) as caught:
        client.models()
    return caught.value


def test_a_token_over_tls_predicts(server: RunningServer, certificates: Certificates, token_file: Path) -> None:
    token = token_file.read_text().strip()
    with GHNClient(localhost(server), token=token, root_certificates=certificates.ca) as client:
        assert len(client.predict(TINY)) == 6


def test_health_needs_no_token(server: RunningServer, certificates: Certificates) -> None:
    with GHNClient(localhost(server), root_certificates=certificates.ca) as client:
        assert client.health().ready


@pytest.mark.parametrize("token", [None, "wrong-secret"])
def test_a_missing_or_wrong_token_is_an_authentication_error(
    server: RunningServer, certificates: Certificates, token: str | None
) -> None:
    error = failure(localhost(server), token=token, root_certificates=certificates.ca)
    assert type(error) is AuthenticationError
    assert "--token-file" in str(error)
    assert error.request_id
    assert "secret" not in str(error)


def test_a_wrong_authority_is_named_with_what_to_do(server: RunningServer, tmp_path: Path) -> None:
    error = failure(localhost(server), root_certificates=Certificates(tmp_path / "other").ca)
    assert type(error) is AuthenticationError
    assert "--ca-file" in str(error)


def test_a_certificate_for_another_name_needs_that_name(
    server: RunningServer, certificates: Certificates, token_file: Path
) -> None:
    error = failure(server.address, root_certificates=certificates.ca)
    assert type(error) is AuthenticationError
    assert "--server-name" in str(error)
    options = {"token": token_file.read_text().strip(), "root_certificates": certificates.ca}
    with GHNClient(f"ipv4:{server.address}", server_name="ghn.example.org", **options) as client:
        assert client.models()


def test_an_expired_certificate_is_an_authentication_error(tmp_path: Path, certificates: Certificates) -> None:
    past = datetime.datetime(2020, 1, 1)
    certificate, key = certificates.issue("expired", "localhost", not_after=past)
    with fake_server(tmp_path, tls_certificate=certificate, tls_key=key) as server:
        error = failure(localhost(server), root_certificates=certificates.ca)
    assert type(error) is AuthenticationError
    assert "expired" in str(error)


def test_plain_text_to_tls_says_so(server: RunningServer) -> None:
    error = failure(server.address)
    assert type(error) is ServerUnavailableError
    assert "--tls" in str(error)


def test_tls_to_plain_text_says_so(tmp_path: Path, certificates: Certificates) -> None:
    with fake_server(tmp_path) as server:
        assert type(failure(server.address, root_certificates=certificates.ca)) is AuthenticationError


def test_a_server_that_asks_for_certificates(tmp_path: Path, certificates: Certificates) -> None:
    certificate, key = certificates.issue("server", "localhost")
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": certificates.ca}
    with fake_server(tmp_path, **settings) as server:
        error = failure(localhost(server), root_certificates=certificates.ca)
        assert type(error) is ServerUnavailableError
        assert "--cert-file" in str(error)
        own, own_key = certificates.issue("alice", "alice@example.org")
        options = {"root_certificates": certificates.ca, "client_certificate": own, "client_key": own_key}
        with GHNClient(localhost(server), **options) as client:
            assert client.models()


@pytest.mark.parametrize("source", ["flag", "GHN_TOKEN_FILE", "GHN_TOKEN"])
def test_the_command_takes_a_token_of_a_file_or_the_environment(
    server: RunningServer, certificates: Certificates, token_file: Path, source: str
) -> None:
    arguments = ["models", "--address", localhost(server), "--ca-file", str(certificates.ca)]
    assert CliRunner().invoke(app, arguments).exit_code == 7
    flags = ["--token-file", str(token_file)] if source == "flag" else []
    value = token_file.read_text() if source == "GHN_TOKEN" else str(token_file)
    env = {} if source == "flag" else {source: value}
    assert CliRunner().invoke(app, [*arguments, *flags], env=env).exit_code == 0


def test_no_flag_takes_the_token_itself() -> None:
    for command in ("predict", "models", "health"):
        assert "--token " not in CliRunner().invoke(app, [command, "--help"]).stdout
