"""The manifests of ``deploy/``: valid Kubernetes, and settings that the server takes and that fit each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ghn_client.wire.codec import SERVICE
from ghn_service.server.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
Manifests = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["base", "gpu"])
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """What kustomize makes of an overlay, by kind."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the extra test has it")
    folder = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(ROOT / "deploy" / "kubernetes", folder)
    (folder / "base" / "tokens").write_text("alice " + "0" * 64)
    command = [kubectl, "kustomize", str(folder / request.param)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container(manifests: Manifests) -> dict[str, Any]:
    (only,) = pod(manifests)["containers"]
    return only


def pod(manifests: Manifests) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def variables(manifests: Manifests) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(manifests)["env"] if "value" in item}


def settings(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a server in the pod is set to; the host is that of the image."""
    for name, value in variables(manifests).items():
        monkeypatch.setenv(name, value)
    return load_settings(host="0.0.0.0")


def test_every_kind_of_object_is_there(manifests: Manifests) -> None:
    kinds = {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "Secret"}
    assert set(manifests) == kinds


def test_the_objects_are_valid(manifests: Manifests) -> None:
    version = kubernetes_validate.latest_version()
    for document in manifests.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_object_is_not(manifests: Manifests) -> None:
    manifests["Deployment"]["spec"]["nonsense"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifests["Deployment"], kubernetes_validate.latest_version(), strict=True)
    del manifests["Deployment"]["spec"]["nonsense"]


def test_variables_are_settings_of_the_server(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"GHN_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in variables(manifests) if name.startswith("GHN_")} <= names
    assert not pod(manifests)["enableServiceLinks"]  # a Service called ghn-metrics would set GHN_METRICS_PORT
    settings(manifests, monkeypatch)


def test_the_pod_outlives_its_streams(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(manifests, monkeypatch)
    assert pod(manifests)["terminationGracePeriodSeconds"] > chosen.drain_seconds + chosen.grace_seconds
    assert chosen.drain_seconds > container(manifests)["readinessProbe"]["periodSeconds"]


def test_ports_are_those_of_the_settings(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(manifests, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert ports == {"grpc": chosen.port, "health": chosen.health_port, "metrics": chosen.metrics_port}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container(manifests)[probe]["grpc"]["port"] == chosen.health_port
    assert container(manifests)["readinessProbe"]["grpc"]["service"] == SERVICE
    named = {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]}
    allowed = {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    assert named == allowed == {"grpc", "metrics"}
    assert manifests["Service"]["spec"]["clusterIP"] == "None"


def test_files_are_mounted_where_the_settings_look(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(manifests, monkeypatch)
    secrets = {
        volume["name"]: volume["secret"]["secretName"] for volume in pod(manifests)["volumes"] if "secret" in volume
    }
    mounts = {mount["mountPath"]: mount for mount in container(manifests)["volumeMounts"]}
    assert chosen.tokens is not None
    assert chosen.tls_certificate is not None
    tokens, tls = mounts[str(chosen.tokens.parent)], mounts[str(chosen.tls_certificate.parent)]
    assert secrets[tokens["name"]] == manifests["Secret"]["metadata"]["name"]
    assert chosen.tokens.name in manifests["Secret"]["data"]
    assert secrets[tls["name"]] == "ghn-tls"
    assert not any("subPath" in mount for mount in mounts.values())  # such a file is never renewed


def test_selectors_select_the_pods(manifests: Manifests) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert manifests["Service"]["spec"]["selector"].items() <= labels
    for kind, field in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert manifests[kind]["spec"][field]["matchLabels"].items() <= labels
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "ghn"
    assert "replicas" not in manifests["Deployment"]["spec"]


def test_the_pod_has_a_limit_of_memory_and_few_rights(manifests: Manifests) -> None:
    assert "memory" in container(manifests)["resources"]["limits"]
    context = container(manifests)["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert pod(manifests)["securityContext"]["runAsNonRoot"]
    assert not pod(manifests)["automountServiceAccountToken"]
    is_on_gpu = "nvidia.com/gpu" in container(manifests)["resources"]["limits"]
    assert is_on_gpu == (variables(manifests).get("GHN_DEVICE") == "cuda")


def test_compose_publishes_on_this_machine_with_a_limit_of_memory() -> None:
    for service in yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["mem_limit"] == service["memswap_limit"]
        names = {f"GHN_{name.upper()}" for name in Settings.model_fields}
        assert set(service["environment"]) <= names
