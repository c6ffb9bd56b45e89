"""Who comes in and who does not: tokens, TLS, client certificates, and what is written about it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ghn_client.wire import ghn_pb2, ghn_pb2_grpc
from ghn_service.__main__ import app
from ghn_service.errors import ConfigurationError, UnauthenticatedError
from ghn_service.server.access import Tokens, exposure_warning, make_token, parse_tokens
from ghn_service.server.app import RunningServer
from ghn_service.server.settings import Settings
from tests.server.certificates import Certificates
from tests.server.fake_predictor import code_of, fake_server, predict_request, receive_file
from tests.server.patience import PATIENCE_S, wait_until
from tests.server.small_models import TINY

CODE = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file with a salted and a plain hash."""
    plain = hashlib.sha256(b"plain").hexdigest()
    path = tmp_path / "tokens"
    path.write_text(f"# who may come in\n\nalice {make_token_line('salted')}\nbob {plain}\n")
    return path


def make_token_line(token: str, salt: str = "00ff") -> str:
    return f"{salt}:{hashlib.sha256((salt + token).encode()).hexdigest()}"


def models(channel: grpc.Channel, metadata: Metadata = ()) -> Any:
    stub = ghn_pb2_grpc.GhnServiceStub(channel)
    return stub.ListModels(ghn_pb2.ListModelsRequest(), metadata=metadata, timeout=PATIENCE_S).models


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_a_made_token_opens_the_line_that_was_made_with_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    result = CliRunner().invoke(app, ["make-token", "alice", "--tokens", str(path)])
    token = result.stdout.strip()
    assert Tokens(path).admit(bearer(token)) == "alice"
    assert path.stat().st_mode & 0o077 == 0
    assert token not in path.read_text() + result.stderr
    second = CliRunner().invoke(app, ["make-token", "bob", "--tokens", str(path)]).stdout.strip()
    assert [Tokens(path).admit(bearer(item)) for item in (token, second)] == ["alice", "bob"]


def test_a_token_without_a_file_comes_with_its_line() -> None:
    result = CliRunner().invoke(app, ["make-token", "alice"])
    line = next(line for line in result.stderr.splitlines() if line.startswith("alice "))
    (parsed,) = parse_tokens(line.encode(), Path("tokens"))
    token = result.stdout.strip()
    assert parsed.digest == hashlib.sha256((parsed.salt + token).encode()).digest()


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak", "x" * 65])
def test_names_fit_a_line(name: str) -> None:
    with pytest.raises(ConfigurationError):
        make_token(name)


def test_salted_and_plain_hashes_open(tokens: Path) -> None:
    assert [Tokens(tokens).admit(bearer(token)) for token in ("salted", "plain")] == ["alice", "bob"]


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("other"),
        bearer(""),
        bearer(hashlib.sha256(b"plain").hexdigest()),
        (("authorization", "plain"),),
        (("authorization", "Basic plain"),),
        (*bearer("plain"), *bearer("plain")),
        (("authorization-bin", b"Bearer plain"),),
    ],
)
def test_other_metadata_does_not(tokens: Path, metadata: Metadata) -> None:
    with pytest.raises(UnauthenticatedError):
        Tokens(tokens).admit(metadata)


@given(st.text(st.characters(codec="latin-1"), max_size=2000))
def test_no_text_opens_by_accident_or_breaks(text: str) -> None:
    tokens = Tokens.__new__(Tokens)
    tokens._file = type("File", (), {"value": lambda self: parse_tokens(b"a " + b"0" * 64, Path("t"))})()
    with pytest.raises(UnauthenticatedError) as caught:
        tokens.admit((("authorization", f"Bearer {text}"),))
    assert len(text.strip()) < 8 or text not in str(caught.value)


def test_changed_tokens_are_taken_up_and_broken_ones_are_not(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = Tokens(tokens)
    tokens.write_text("carol " + hashlib.sha256(b"new").hexdigest())
    assert known.admit(bearer("new")) == "carol"
    with pytest.raises(UnauthenticatedError):
        known.admit(bearer("plain"))
    tokens.write_text("dave new-secret-in-plain-text")
    assert known.admit(bearer("new")) == "carol"
    tokens.unlink()
    assert known.admit(bearer("new")) == "carol"
    assert [record.levelname for record in caplog.records].count("ERROR") == 2
    assert "new-secret" not in caplog.text
    tokens.write_text("")
    with pytest.raises(UnauthenticatedError):
        known.admit(bearer("new"))


@pytest.mark.parametrize(
    "content", [b"", b"# nobody\n", b"alice", b"alice " + b"0" * 63, b"alice " + b"0" * 65, b"\xff"]
)
def test_a_server_does_not_start_with_unusable_tokens(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "tokens").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        Tokens(path)
    assert "000" not in str(caught.value)


@pytest.fixture
def guarded(tmp_path: Path, tokens: Path) -> Iterator[RunningServer]:
    with fake_server(tmp_path, tokens=tokens, reflection=True) as server:
        yield server


def test_with_tokens_every_rpc_but_health_needs_one(guarded: RunningServer) -> None:
    reflect = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(guarded.address) as channel:
        stub = ghn_pb2_grpc.GhnServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        calls = {
            method.name: getattr(stub, method.name)
            for method in ghn_pb2.DESCRIPTOR.services_by_name["GhnService"].methods
        }
        requests = {"PredictWeights": predict_request(TINY)}
        for name, call in calls.items():
            request = requests.get(name) or getattr(ghn_pb2, f"{name}Request")()

            def finish(request: Any = request, call: Any = call, **kwargs: Any) -> None:
                answer = call(request, timeout=PATIENCE_S, **kwargs)
                if hasattr(answer, "cancel"):
                    list(answer)

            assert code_of(finish) is CODE.UNAUTHENTICATED, name
            assert code_of(lambda finish=finish: finish(metadata=bearer("wrong"))) is CODE.UNAUTHENTICATED, name
            assert code_of(lambda finish=finish: finish(metadata=bearer("plain"))) is not CODE.UNAUTHENTICATED, name
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        assert code_of(lambda: next(reflection(iter([reflect])))) is CODE.UNAUTHENTICATED
        assert next(reflection(iter([reflect]), metadata=bearer("plain"))).list_services_response.service
        unknown = channel.unary_unary("/ghn.v1.GhnService/Unknown")
        assert code_of(lambda: unknown(b"")) is CODE.UNAUTHENTICATED
        assert code_of(lambda: unknown(b"", metadata=bearer("plain"))) is CODE.UNIMPLEMENTED
        assert health.Check(health_pb2.HealthCheckRequest(service=""), timeout=PATIENCE_S).status
        assert next(health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=PATIENCE_S)).status


def test_a_refusal_has_details(guarded: RunningServer) -> None:
    with grpc.insecure_channel(guarded.address) as channel, pytest.raises(grpc.RpcError) as caught:
        models(channel)
    (detail,) = rpc_status.from_call(caught.value).details
    detail.Unpack(info := error_details_pb2.ErrorInfo())
    assert info.reason == "UNAUTHENTICATED"


@pytest.mark.parametrize(("choice", "is_on"), [({}, False), ({"reflection": True}, True)])
def test_reflection_is_off_with_tokens_unless_asked_for(
    tmp_path: Path, tokens: Path, choice: dict[str, bool], is_on: bool
) -> None:
    with fake_server(tmp_path, tokens=tokens, **choice) as server, grpc.insecure_channel(server.address) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        code = code_of(lambda: next(reflection(iter([request]), metadata=bearer("plain"))))
    assert code is (CODE.OK if is_on else CODE.UNIMPLEMENTED)


def test_calls_are_logged_with_the_name_and_without_the_token(
    guarded: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with grpc.insecure_channel(guarded.address) as channel:
        models(channel, bearer("plain"))
        code_of(lambda: models(channel, bearer("wrong-secret")))
        code_of(lambda: models(channel))
    wait_until(lambda: len([record for record in caplog.records if record.message.startswith("call")]) == 3)
    lines = [record.__dict__ for record in caplog.records]
    assert "wrong-secret" not in str(lines)
    assert "plain" not in str(lines)


# ---- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def tls_settings(certificates: Certificates, *identities: str, client_ca: Path | None = None) -> dict[str, Any]:
    certificate, key = certificates.issue("server", *(identities or ("localhost", "127.0.0.1")))
    return {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": client_ca}


def secure_channel(server: RunningServer, ca: Path, pair: tuple[Path, Path] | None = None) -> grpc.Channel:
    certificate, key = (path.read_bytes() for path in pair) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, certificate)
    return grpc.secure_channel(server.address, credentials)


def test_calls_go_over_tls_and_not_in_plain_text(tmp_path: Path, certificates: Certificates) -> None:
    with fake_server(tmp_path, **tls_settings(certificates)) as server:
        with secure_channel(server, certificates.ca) as channel:
            assert receive_file(ghn_pb2_grpc.GhnServiceStub(channel).PredictWeights(predict_request(TINY)))
        with grpc.insecure_channel(server.address) as channel:
            assert code_of(lambda: models(channel)) is CODE.UNAVAILABLE


def test_renewed_certificates_are_taken_up_and_broken_ones_are_not(tmp_path: Path, certificates: Certificates) -> None:
    old, new = Certificates(tmp_path / "old"), Certificates(tmp_path / "new")
    with fake_server(tmp_path, **tls_settings(old)) as server, secure_channel(server, old.ca) as kept:
        models(kept)
        certificate, key = new.issue("server", "localhost", "127.0.0.1")
        certificate.replace(old.folder / "server.pem")
        with secure_channel(server, old.ca) as channel:  # certificate and key do not belong together yet
            models(channel)
        key.replace(old.folder / "server.key")
        with secure_channel(server, new.ca) as channel:
            models(channel)
        with secure_channel(server, old.ca) as channel:
            assert code_of(lambda: models(channel)) is CODE.UNAVAILABLE
        models(kept)


def test_clients_need_a_certificate_of_the_authority(tmp_path: Path, certificates: Certificates) -> None:
    stranger = Certificates(tmp_path / "stranger")
    with fake_server(tmp_path, **tls_settings(certificates, client_ca=certificates.ca)) as server:
        for pair in (None, stranger.issue("eve", "eve@example.org")):
            with secure_channel(server, certificates.ca, pair) as channel:
                assert code_of(lambda channel=channel: models(channel)) is CODE.UNAVAILABLE
        with secure_channel(server, certificates.ca, certificates.issue("alice", "alice@example.org")) as channel:
            assert models(channel)


def test_probes_without_tls_have_a_port_of_their_own(tmp_path: Path, certificates: Certificates) -> None:
    settings = tls_settings(certificates)
    with (
        fake_server(tmp_path, health_port=0, **settings) as server,
        grpc.insecure_channel(server.health_address) as channel,
    ):
        request = health_pb2.HealthCheckRequest(service="ghn.v1.GhnService")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert code_of(lambda: models(channel)) is CODE.UNIMPLEMENTED


@pytest.mark.parametrize("fault", ["missing", "no key", "not pem", "swapped", "no certificate"])
def test_unusable_files_are_refused_at_the_start(tmp_path: Path, certificates: Certificates, fault: str) -> None:
    certificate, key = certificates.issue("server", "localhost")
    (rubbish := tmp_path / "rubbish").write_text("rubbish")
    settings = {
        "missing": {"tls_certificate": tmp_path / "nothing", "tls_key": key},
        "no key": {"tls_certificate": certificate},
        "not pem": {"tls_certificate": certificate, "tls_key": rubbish},
        "swapped": {"tls_certificate": key, "tls_key": certificate},
        "no certificate": {"tls_client_ca": certificates.ca},
    }[fault]
    with pytest.raises(ConfigurationError), fake_server(tmp_path, **settings):
        pass


# ---- what a server on a network is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ()),
        ({"host": "[::1]"}, ()),
        ({"host": "0.0.0.0"}, ("--tokens", "--tls-certificate")),
        ({"host": "[::]"}, ("--tokens", "--tls-certificate")),
        ({"host": "0.0.0.0", "tokens": "t"}, ("--tls-certificate",)),
        ({"host": "0.0.0.0", "tls_certificate": "c"}, ("--tokens",)),
        ({"host": "0.0.0.0", "tls_certificate": "c", "tokens": "t"}, ()),
        ({"host": "0.0.0.0", "tls_certificate": "c", "tls_client_ca": "a"}, ()),
    ],
)
def test_an_open_server_says_what_to_do(settings: dict[str, str], told: tuple[str, ...]) -> None:
    warning = exposure_warning(Settings(**settings))
    assert bool(warning) == bool(told)
    assert all((flag in warning) == (flag in told) for flag in ("--tokens", "--tls-certificate"))


def test_an_open_server_warns_once_and_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_server(tmp_path, host="0.0.0.0") as server, grpc.insecure_channel(server.address) as channel:
        assert models(channel)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
