"""The manifests of deploy/kubernetes: rendered, validated strictly, and held to what the documentation promises."""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weightd
from support.daemon import ROOT, environment
from support.kubernetes import checkpoint
from weightd_daemon.config.notation import parse_size
from weightd_fleet.engines.kubernetes_labels import checkpoint_labels

kubernetes_validate = pytest.importorskip("kubernetes_validate")
celpy = pytest.importorskip("celpy")
yaml = pytest.importorskip("yaml")

VERSION = "1.37.0"
"""Of Kubernetes, whose schemas the manifests are checked with."""
FOLDER = ROOT / "deploy/kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = ("daemon", "systemd")
UNPRIVILEGED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

Resource = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Resource]]:
    """What each overlay applies."""
    if not KUBECTL.exists():
        pytest.skip("no kubectl in this environment: make test-fleet")
    found = {}
    for overlay in OVERLAYS:
        done = subprocess.run(
            [KUBECTL, "kustomize", FOLDER / "overlays" / overlay],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[overlay] = list(yaml.safe_load_all(done.stdout))
    found["client"] = [yaml.safe_load((FOLDER / "client.yaml").read_text())]
    return found


def one(resources: list[Resource], kind: str, name: str) -> Resource:
    (found,) = [one for one in resources if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def pods(resources: list[Resource]) -> Iterator[Resource]:
    """The specs of pods."""
    for resource in resources:
        if resource["kind"] == "Pod":
            yield resource["spec"]
        elif resource["kind"] == "DaemonSet":
            yield resource["spec"]["template"]["spec"]


def container(rendered: dict[str, list[Resource]], name: str) -> Resource:
    found: Resource = one(rendered["daemon"], "DaemonSet", name)["spec"]["template"]["spec"]["containers"][0]
    return found


def gibibytes(quantity: str) -> int:
    """Bytes of a quantity such as 68Gi."""
    return parse_size(quantity + "B")


def test_all_are_valid_and_nothing_is_misspelt(rendered: dict[str, list[Resource]]) -> None:
    kinds = {overlay: {resource["kind"] for resource in resources} for overlay, resources in rendered.items()}
    assert kinds["daemon"] == kinds["systemd"] | {"ConfigMap"}
    for resources in rendered.values():
        for resource in resources:
            assert kubernetes_validate.validate(resource, VERSION, strict=True) == "1.37"


def test_a_misspelt_probe_is_found(rendered: dict[str, list[Resource]]) -> None:
    broken = copy.deepcopy(one(rendered["daemon"], "DaemonSet", "weightd"))
    spec = broken["spec"]["template"]["spec"]["containers"][0]
    spec["livenesProbe"] = spec.pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_the_limit_of_memory_is_the_budget_and_four_gibibytes(rendered: dict[str, list[Resource]]) -> None:
    settings = tomllib.loads(one(rendered["daemon"], "ConfigMap", "weightd")["data"]["weightd.toml"])
    (budget,) = settings["budget"]
    resources = container(rendered, "weightd")["resources"]
    assert gibibytes(resources["limits"]["memory"]) == parse_size(budget.removeprefix("host=")) + (4 << 30)
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" not in resources["limits"]


def test_the_settings_are_settings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightd", "config", "--config", FOLDER / "overlays/daemon/weightd.toml"],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["metrics_access"] == "remote"


def test_probes_ask_pages_that_are_there(rendered: dict[str, list[Resource]]) -> None:
    """Loading keeps /readyz from answering 200, and never /healthz: no load makes the kubelet restart a daemon."""
    daemon = container(rendered, "weightd")
    ports = {port["name"]: port["containerPort"] for port in daemon["ports"]}
    settings = tomllib.loads((FOLDER / "overlays/daemon/weightd.toml").read_text())
    assert settings["metrics"].endswith(f":{ports['metrics']}")
    paths = {name: daemon[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    liveness = daemon["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 300


def test_nothing_runs_with_more_rights_than_it_needs(rendered: dict[str, list[Resource]]) -> None:
    seen = 0
    for spec in (spec for resources in rendered.values() for spec in pods(resources)):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for one_of in spec["containers"]:
            assert one_of["securityContext"] == UNPRIVILEGED
            seen += 1
        for initial in spec.get("initContainers", []):
            assert initial["command"][:2] == ["chown", "6464:6464"]
            assert initial["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert seen == 4


def test_only_the_daemon_may_write_to_the_folder_of_its_sockets(rendered: dict[str, list[Resource]]) -> None:
    writers = [
        (container["name"], mount["mountPath"])
        for resources in rendered.values()
        for spec in pods(resources)
        for container in spec["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == "sockets" and not mount.get("readOnly")
    ]
    assert writers == [("weightd", "/run/weightd")]


def test_daemon_sets_change_one_node_at_a_time(rendered: dict[str, list[Resource]]) -> None:
    sets = [one for one in rendered["daemon"] if one["kind"] == "DaemonSet"]
    assert len(sets) == 2
    for daemon_set in sets:
        assert daemon_set["spec"]["updateStrategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 1},
        }
        assert daemon_set["spec"]["template"]["spec"]["priorityClassName"] == "system-node-critical"


def test_images_are_of_this_version(rendered: dict[str, list[Resource]]) -> None:
    images = {
        container["image"]
        for overlay in OVERLAYS
        for spec in pods(rendered[overlay])
        for container in [*spec["containers"], *spec["initContainers"]]
    }
    assert images == {f"weightd:{weightd.__version__}"}


def test_the_agent_takes_its_command_line(rendered: dict[str, list[Resource]]) -> None:
    """As the kubelet expands it, with a certificate that is missing: the only thing that is wrong is that."""
    arguments = container(rendered, "weightd-agent")["args"]
    expanded = [one.replace("$(POD_IP)", "10.1.2.3").replace("$(NODE_NAME)", "n0") for one in arguments]
    assert not [one for one in expanded if "$(" in one]
    done = subprocess.run(
        [sys.executable, "-m", "weightd", *expanded],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "/etc/weightd/fleet/ca.pem: cannot be read" in done.stderr
        or "cert.pem: cannot be read" in done.stderr
        or ("key.pem: cannot be read" in done.stderr)
    )


# -- who may change what of a node -------------------------------------------------------------------------------------

NODE = {
    "metadata": {
        "name": "n0",
        "labels": {"kubernetes.io/hostname": "n0", "weightd.io/enabled": "true", "weightd.io/c-0123456789abcdef": "4"},
        "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
    },
    "spec": {"podCIDR": "10.1.2.0/24"},
}


def test_the_rights_are_for_reading_and_patching_nodes(rendered: dict[str, list[Resource]]) -> None:
    role = one(rendered["systemd"], "ClusterRole", "weightd-agent")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]


def evaluated(expression: str, **values: object) -> Any:
    engine = celpy.Environment()
    return celpy.json_to_cel(
        engine.program(engine.compile(expression)).evaluate(
            {name: celpy.json_to_cel(value) for name, value in values.items()}
        )
    )


def refusals(policy: Resource, after: Resource, *, node: str | None = "n0", agent: bool = True) -> list[str]:
    """The messages with which the policy refuses a change of NODE, by who runs on a node; none: it is admitted."""
    extra = {"authentication.kubernetes.io/node-name": [node]} if node else {}
    account = "weightd:weightd-agent" if agent else "kube-system:someone"
    values: dict[str, Any] = {
        "object": after,
        "oldObject": NODE,
        "request": {"userInfo": {"username": f"system:serviceaccount:{account}", "extra": extra}},
    }
    spec = policy["spec"]
    if not all(evaluated(condition["expression"], **values) for condition in spec["matchConditions"]):
        return []
    values["variables"] = {
        variable["name"]: evaluated(variable["expression"], **values) for variable in spec["variables"]
    }
    return [rule["message"] for rule in spec["validations"] if not evaluated(rule["expression"], **values)]


def changed(**parts: Any) -> Resource:
    """NODE with other labels (None removes one), and other parts of its metadata or its spec."""
    node: Resource = copy.deepcopy(NODE)
    for key, value in parts.pop("labels", {}).items():
        if value is None:
            del node["metadata"]["labels"][key]
        else:
            node["metadata"]["labels"][key] = value
    node["spec"] |= parts.pop("spec", {})
    node["metadata"] |= parts
    return node


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"labels": {"weightd.io/enabled": "false"}}, "change labels"),
        ({"labels": {"weightd.io/enabled": None}}, "change labels"),
        ({"labels": {"node-role.kubernetes.io/control-plane": ""}}, "change labels"),
        ({"spec": {"unschedulable": True}}, "spec"),
        ({"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}}, "spec"),
        ({"annotations": {}}, "annotations"),
        ({"finalizers": ["weightd.io/stay"]}, "finalizers"),
        ({"ownerReferences": [{"uid": "1"}]}, "owners"),
        ({"name": "n1"}, "the node that it runs on"),
    ],
)
def test_the_policy_refuses_an_agent(rendered: dict[str, list[Resource]], change: dict[str, Any], why: str) -> None:
    policy = one(rendered["systemd"], "ValidatingAdmissionPolicy", "weightd-agent")
    (message,) = refusals(policy, changed(**change))
    assert why in message
    assert refusals(policy, changed(**change), agent=False) == []


def test_the_policy_refuses_a_token_that_is_not_bound_to_the_node(rendered: dict[str, list[Resource]]) -> None:
    policy = one(rendered["systemd"], "ValidatingAdmissionPolicy", "weightd-agent")
    for node in ("n1", None):
        assert len(refusals(policy, NODE, node=node)) == 1


def test_the_policy_admits_what_the_agent_writes(rendered: dict[str, list[Resource]]) -> None:
    policy = one(rendered["systemd"], "ValidatingAdmissionPolicy", "weightd-agent")
    written: dict[str, str | None] = dict(checkpoint_labels([checkpoint(1)]))
    assert refusals(policy, changed(labels={"weightd.io/c-0123456789abcdef": None, **written})) == []
    binding = one(rendered["systemd"], "ValidatingAdmissionPolicyBinding", "weightd-agent")
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
