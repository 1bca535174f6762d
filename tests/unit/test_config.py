"""Settings: which word counts, where each came from, and what is said of those that cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from support.daemon import environment
from weightd_daemon.config import settings
from weightd_daemon.config.notation import means, parse_size, whole_uuid
from weightd_daemon.config.preload_entry import PreloadConfig
from weightd_daemon.config.settings import ConfigError, Settings, TemporaryConfigError, load
from weightd_daemon.core.limits import UserLimits

NAMES = [setting.name for setting in fields(Settings)]
UUID = "GPU-1a2b3c4d-0123-4567-89ab-cdef01234567"


@pytest.fixture(autouse=True)
def no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "default_config_path", lambda: None)


def toml(folder: Path, text: str) -> Path:
    path = folder / "weightd.toml"
    path.write_text(text)
    return path


def refused(config_file: Path | None = None, flags: dict[str, str | None] | None = None, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config_file, flags or {}, environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_word_everything_is_default() -> None:
    loaded = load(None, {}, {})
    assert loaded.origins == dict.fromkeys(NAMES, "default")
    assert loaded.settings == Settings()
    assert (loaded.settings.devices, loaded.settings.admin_uids) == (("auto",), frozenset())
    assert (loaded.settings.budget_for((UUID, "cuda:0", "cuda")), loaded.settings.budget_devices) == (None, frozenset())


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'max_loads = 1\nbudget = "1GiB"\nlog_level = "debug"\n')
    environment = {"WEIGHTD_MAX_LOADS": "2", "WEIGHTD_BUDGET": "2GiB", "WEIGHTD_ISOLATION": ""}
    settings, origins, _ = load(path, {"max_loads": "3", "socket_mode": None}, environment)
    assert (settings.max_loads, origins["max_loads"]) == (3, "--max-loads")
    assert (settings.budget, origins["budget"]) == ("2GiB", "WEIGHTD_BUDGET")
    assert (settings.log_level, origins["log_level"]) == ("debug", f"{path}: line 3")
    assert (settings.isolation, origins["isolation"]) == ("shared", "default")
    assert (settings.socket_mode, origins["socket_mode"]) == ("0600", "default")


@pytest.mark.parametrize("key", NAMES)
def test_every_setting_has_a_key_a_variable_and_a_flag(tmp_path: Path, key: str) -> None:
    values = {"socket": "/x/s.sock", "socket_mode": "0660", "device": "host", "budget": "1M", "pool": "1M",
              "state_dir": "/x", "isolation": "uid", "admins": "12", "log_level": "error",
              "transport": "cuda_ipc", "model_roots": "/x,~/y", "preload": "/x/a,org/name", "max_user_bytes": "1G",
              "log_format": "json", "metrics": "127.0.0.1:9464",
              "metrics_access": "remote"}  # fmt: skip
    value = values.get(key, "7")
    quoted = value if key not in values else json.dumps(value)
    roots = {"model_roots": "/x"} if key == "preload" else {}
    more = {f"WEIGHTD_{name.upper()}": said for name, said in roots.items()}
    by_file = load(toml(tmp_path, f"{key} = {quoted}\n"), {}, more)
    by_variable = load(None, {}, {f"WEIGHTD_{key.upper()}": value, **more})
    by_flag = load(None, {key: value}, more)
    assert by_file.settings == by_variable.settings == by_flag.settings != Settings()
    assert [by_variable.origins[key], by_flag.origins[key]] == [f"WEIGHTD_{key.upper()}", f"--{key.replace('_', '-')}"]


BAD = [
    ("socket", "/" + "x" * 100 + ".sock", "shorter"),
    ("socket_mode", "0990", "octal"),
    ("socket_mode", "rw", "octal"),
    ("device", "tpu", "use host, cuda"),
    ("device", "cpu", "use host, cuda"),
    ("device", " ", "'' is not a device"),
    ("device", "host,", "'' is not a device"),
    ("device", "host,,cuda", "'' is not a device"),
    ("device", "cuda:", "'cuda:' is not a device"),
    ("device", "cuda:-1", "'cuda:-1' is not a device"),
    ("device", "cuda:x", "'cuda:x' is not a device"),
    ("device", "cuda:00", "'cuda:00' is not a device"),
    ("device", "cuda:\u0661", "is not a device"),
    ("device", "cuda:0 cuda:1", "'cuda:0 cuda:1' is not a device"),
    ("device", "CUDA", "'CUDA' is not a device"),
    ("device", "GPU-", "'GPU-' is not a device"),
    ("device", "GPU-1a2b3c4", "first 8 digits"),
    ("device", "GPU-1a2b3c4g", "is not a device"),
    ("device", "GPU-1a2b3c4d5", "is not a device"),
    ("device", UUID + "8", "is not a device"),
    ("device", UUID.removeprefix("GPU-"), "is not a device"),
    ("device", "host,auto", "auto is every device"),
    ("device", "auto,auto", "auto is every device"),
    ("device", "host, host", "host and host do not name two devices"),
    ("device", f"{UUID},GPU-1A2B3C4D", f"GPU-1a2b3c4d and {UUID} do not name two devices"),
    ("device", "cuda,cuda:1", "cuda is every GPU"),
    ("transport", "ipc", "auto, cuda_vmm, cuda_ipc"),
    ("transport", "", "auto, cuda_vmm, cuda_ipc"),
    ("budget", "much", "12GiB"),
    ("budget", "0", "more than 0"),
    ("budget", "0%", "more than 0"),
    ("budget", "101%", "100%"),
    ("budget", "x%", "'x%' is not a size"),
    ("budget", "nan%", "'nan%' is not a size"),
    ("budget", "-1GiB", "size"),
    ("budget", "9" * 400, "size"),
    ("budget", ",", "'' is not a size"),
    ("budget", "host=1GiB,", "'' is not a size"),
    ("budget", "1GiB,80%", "more than one value"),
    ("budget", "cuda:0=", "'' is not a size"),
    ("budget", "=5", "'' is not a device"),
    ("budget", "host=1=2", "'host=1' is not a device"),
    ("budget", "auto=1GiB", "'auto' is not a device"),
    ("budget", "cuda:x=1GiB", "'cuda:x' is not a device"),
    ("budget", "GPU-1a2b=1GiB", "'GPU-1a2b' is not a device"),
    ("budget", "host=0", "more than 0"),
    ("budget", "cuda=150%", "at most 100%"),
    ("budget", "50%,cuda=1GiB,cuda=2GiB", "cuda and cuda do not name two devices"),
    ("budget", f"{UUID}=1GiB,GPU-1a2b3c4d=2GiB", "do not name two devices"),
    ("books", "some", "size"),
    ("pool", "some", "size"),
    ("pool", "9" * 400, "size"),
    ("pool", "cuda=1GiB", "size"),
    ("isolation", "none", "shared, uid"),
    ("metrics", "9464", "an IP address and a port"),
    ("metrics", "0.0.0.0:9464", "only this machine"),
    ("metrics", "192.0.2.1:9464", "only this machine"),
    ("metrics", "127.0.0.1", "an IP address and a port"),
    ("metrics", "127.0.0.1:0", "an IP address and a port"),
    ("metrics", "127.0.0.1:65536", "an IP address and a port"),
    ("metrics", "127.0.0.1:9464 ", "an IP address and a port"),
    ("metrics", "[::]:9464", "only this machine"),
    ("metrics", "::1:9464", "an IP address and a port"),
    ("metrics", "localhost:9464", "an IP address and a port"),
    ("metrics", "w.sock", "an IP address and a port"),
    ("metrics", "1.2.3:9464", "an IP address and a port"),
    ("metrics", "/" + "x" * 107, "shorter"),
    ("metrics_access", "all", "local, remote"),
    ("admins", "no-such-user-here", "no user no-such-user-here"),
    ("admins", "0 4294967295", "no user 4294967295"),
    ("reader_threads", "-1", "at least 0"),
    ("reader_threads", "257", "must be at most 256"),
    ("max_loads", "0", "at least 1"),
    ("max_loads", "1025", "must be at most 1024"),
    ("max_connections", "0", "at least 1"),
    ("max_connections", "1048577", "must be at most 1048576"),
    ("max_user_names", "2147483648", "must be at most 2147483647"),
    ("max_loads", "many", "not a number"),
    ("log_level", "loud", "debug, info"),
    ("log_format", "xml", "text, json"),
    ("model_roots", "models", "'models' is not an absolute path"),
    ("model_roots", "/x,", "'' is not an absolute path"),
    ("max_user_bytes", "some", "size"),
    ("max_user_leases", "-1", "at least 0"),
    ("preload", "/x,./y", "preload 2: ref = './y': is relative"),
    ("preload", "/x,", "preload 2: has no ref"),
    ("preload", "/x", "may not open any file"),
]


@pytest.mark.parametrize(("key", "value", "why"), BAD, ids=lambda part: str(part)[:20])
def test_a_bad_value_is_refused_with_its_origin(tmp_path: Path, key: str, value: str, why: str) -> None:
    by_flag = refused(flags={key: value})
    assert f"--{key.replace('_', '-')}" in by_flag
    if value:  # an empty variable says nothing
        assert f"WEIGHTD_{key.upper()}" in refused(**{f"WEIGHTD_{key.upper()}": value})
    path = toml(tmp_path, f"# comment\n{key} = {json.dumps(value)}\n")
    by_file = refused(path)
    assert f"{path}: line 2: {key}" in by_file
    for message in (by_flag, by_file):
        assert why in message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("\nmax_load = 3\n", "line 2: max_load: no such setting (did you mean max_loads?); there are socket, "),
        ("\n\nzzz = 3\n", "line 3: zzz: no such setting; there are socket, "),
        ('admins = [\n  "device",\n]\ndevice = "tpu"\n', "line 4: device = 'tpu'"),
        ("model_roots = 5\n", "line 1: model_roots: 5 is not a list"),
        ("model_roots = [5]\n", "line 1: model_roots: [5] is not a list of text"),
        ("[preload]\nref = 1\n", "line 1: preload: {'ref': 1} is not a list"),
        ("preload = [5]\n", "line 1: preload 1: 5 is neither a reference nor a table"),
        (
            '[[preload]]\nref = "a"\n\n[[preload]]\nref = "b"\npinn = true\n',
            "line 6: preload 2: pinn: no such key (did you mean pin?)",
        ),
        (
            '[[preload]]\nref = "a"\npin = 1\n[[preload]]\nref = "b"\n',
            "line 3: preload 1: pin = 1: is not true or false",
        ),
        ('[[preload]]\nref = "a"\n[[preload]]\nname = "b"\n', "line 3: preload 2: has no ref"),
        (
            'preload = [\n  "a",\n  { ref = "b", device = "tpu" },\n]\n',
            "line 3: preload 2: device = 'tpu': 'tpu' is no",
        ),
        ('preload = ["a", { ref = "b", wait = "yes" }]\n', "line 1: preload 2: wait = 'yes': is not true or false"),
        ('preload = ["a\\u0000"]\n', "line 1: preload 1: has no ref"),
        ("max_loads = true\n", "line 1: max_loads: True is not a number"),
        ("max_loads = 1.5\n", "line 1: max_loads: 1.5 is not a number"),
        ("device = []\n", "device = '': '' is not a device"),
        ('device = ["host", ""]\n', "device = 'host,': '' is not a device"),
        ('device = ["host", ["cuda"]]\n', "line 1: device: ['host', ['cuda']] is not text"),
        ('budget = ["1GiB", "host"]\n', "budget = '1GiB,host': 'host' is not a size"),
        ("[budget]\nhost = 1\n", "line 1: budget: {'host': 1} is not text"),
        (f"max_loads = 0x{'f' * 4500}\n", "is not TOML: a number has more than 64 bits"),
        (f"max_loads = {'9' * 5000}\n", "is not TOML: a number has more than 64 bits"),
        (f"preload = [{{ pin = 0x{'f' * 4500} }}]\n", "is not TOML: a number has more than 64 bits"),
        (f"max_loads = {'9' * 4000}\n", "line 1: max_loads = 9999"),
        (f"device{'.a' * 2_000} = 1\n", "is not TOML"),
        ("max_loads = \n", "is not TOML"),
        ("max_loads = 1\nmax_loads = 2\n", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path: Path, text: str, where: str) -> None:
    path = toml(tmp_path, text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert where in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not TOML" in refused(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("1073741824", 1 << 30),
        ("12GiB", 12 << 30),
        ("12 GB", 12 << 30),
        ("12g", 12 << 30),
        ("500M", 500 << 20),
        ("1.5KiB", 1536),
        (" 2T ", 2 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1", "1 2", "1Q", "1GiBs", "0x10", "1,5G", "1e9"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", ("auto",)),
        (" host ", ("host",)),
        ("host,cuda", ("host", "cuda")),
        ("cuda:10, host, cuda:1", ("cuda:10", "host", "cuda:1")),
        ("GPU-1a2b3c4d", ("GPU-1a2b3c4d",)),
        ("GPU-1a2b3c4d-01", ("GPU-1a2b3c4d-01",)),
        (UUID, (UUID,)),
        ("GPU-1A2B3C4D-0123,GPU-2a2b3c4d", ("GPU-1a2b3c4d-0123", "GPU-2a2b3c4d")),
        ("MIG-1A2B3C4D,GPU-2a2b3c4d", ("MIG-1a2b3c4d", "GPU-2a2b3c4d")),
    ],
)
def test_devices_are_listed_in_their_order_each_spelled_one_way(text: str, expected: tuple[str, ...]) -> None:
    assert load(None, {"device": text}, {}).settings.devices == expected


@pytest.mark.parametrize(("key", "items"), [("device", ["host", "cuda:0"]), ("budget", ["cuda=70%", "1GiB"])])
def test_a_repeated_flag_a_list_and_commas_say_the_same(tmp_path: Path, key: str, items: list[str]) -> None:
    by_file = load(toml(tmp_path, f"{key} = {json.dumps(items)}\n"), {}, {})
    by_variable = load(None, {}, {f"WEIGHTD_{key.upper()}": ",".join(items)})
    by_flag = load(None, {key: items}, {})
    assert by_file.settings == by_variable.settings == by_flag.settings == Settings(**{key: ",".join(items)})


def test_a_flag_replaces_the_devices_of_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'device = ["host", "cuda:1"]\n')
    assert load(path, {"device": ["cuda:0"]}, {}).settings.devices == ("cuda:0",)


def test_a_uuid_is_meant_by_its_beginning_and_other_names_only_as_a_whole() -> None:
    assert means("GPU-1a2b3c4d", UUID)
    assert means(UUID, UUID)
    assert not means(UUID, "GPU-1a2b3c4d")
    assert not means("cuda:1", "cuda:10")
    assert not means("cuda", "cuda:0")


def test_a_part_of_a_gpu_may_be_called_as_nvidia_smi_calls_it() -> None:
    part = UUID.replace("GPU-", "MIG-")
    for said in (part, part[:12]):
        assert means(said, UUID)
        assert not means(said, "GPU-00000000")
        assert not means(said, "cuda:0")
    assert whole_uuid(part) == whole_uuid(UUID) == UUID
    assert whole_uuid(part[:-1]) == whole_uuid("cuda:0") == ""
    assert Settings(budget=f"{part[:12]}=1").budget_for((UUID, "cuda:0", "cuda")) == 1
    with pytest.raises(ValueError, match="do not name two devices"):
        _ = Settings(device=f"{part[:12]},{UUID}").devices


def test_one_budget_is_for_every_device_in_bytes_or_a_share() -> None:
    for names in (("host",), (UUID, "cuda:0", "cuda")):
        assert Settings(budget="80%").budget_for(names) == pytest.approx(0.8)
        assert type(Settings(budget="100%").budget_for(names)) is float
        assert Settings(budget="3MiB").budget_for(names) == 3 << 20
        assert type(Settings(budget="1").budget_for(names)) is int


def test_the_most_telling_name_of_a_device_gives_its_budget() -> None:
    settings = Settings(budget=f"cuda=4,3,cuda:0=2, {UUID[:12]} = 1,cuda:1=50%")
    assert settings.budget_for((UUID, "cuda:0", "cuda")) == 1
    assert settings.budget_for(("GPU-00000000", "cuda:0", "cuda")) == 2
    assert settings.budget_for(("GPU-00000000", "cuda:1", "cuda")) == pytest.approx(0.5)
    assert settings.budget_for(("GPU-00000000", "cuda:10", "cuda")) == 4
    assert settings.budget_for(("host",)) == 3
    assert settings.budget_devices == {"cuda", "cuda:0", "cuda:1", UUID[:12]}


def test_a_device_that_no_budget_names_has_none() -> None:
    settings = Settings(budget="host=8GiB,cuda:0=90%")
    assert settings.budget_for(("host",)) == 8 << 30
    assert settings.budget_for((UUID, "cuda:1", "cuda")) is None


def test_admins_are_names_or_uids_in_a_text_or_a_list(tmp_path: Path) -> None:
    assert load(None, {"admins": "root, 1001 4294967294"}, {}).settings.admin_uids == {0, 1001, 4294967294}
    path = toml(tmp_path, 'admins = ["root", 1001]\n')
    assert load(path, {}, {}).settings.admin_uids == {0, 1001}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WEIGHTD_")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "weightd_daemon", *arguments],
        env=inherited | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_prints_every_setting_and_its_origin(tmp_path: Path) -> None:
    path = toml(tmp_path, "max_loads = 2\n")
    done = run("config", "--config", str(path), "--budget", "1GiB", WEIGHTD_LOG_LEVEL="debug")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    by_name = dict(zip(NAMES, lines, strict=True))
    assert by_name["max_loads"].endswith(f"= 2  # {path}: line 1")
    assert by_name["budget"].endswith('= "1GiB"  # --budget')
    assert by_name["log_level"].endswith('= "debug"  # WEIGHTD_LOG_LEVEL')
    assert by_name["isolation"].endswith('= "shared"  # default')


def test_the_command_takes_several_devices_and_budgets_and_one_of_the_rest() -> None:
    done = run("config", "--device=host", "--budget=1GiB", "--pool=1M", "--device", "cuda:0,cuda:1",
               "--budget=cuda=70%", "--pool=2M", "--format=json")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    table = json.loads(done.stdout)
    assert table["device"] == {"value": "host,cuda:0,cuda:1", "origin": "--device"}
    assert table["budget"] == {"value": "1GiB,cuda=70%", "origin": "--budget"}
    assert table["pool"] == {"value": "2M", "origin": "--pool"}


def test_help_describes_every_setting() -> None:
    done = run("serve", "--help", COLUMNS="1000")
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.sub(r"\s+", " ", done.stdout)
    for setting in fields(Settings):
        assert f"--{setting.name.replace('_', '-')} " in shown
        assert setting.metadata["help"] in shown


def test_the_example_has_every_setting_and_each_can_be_uncommented(tmp_path: Path) -> None:
    example = (Path(__file__).resolve().parents[2] / "systemd" / "weightd.toml").read_text()
    assert load(toml(tmp_path, example), {}, {}).settings == Settings()  # as it is, it changes nothing
    settings, origins, _ = load(toml(tmp_path, re.sub(r"^# (\w+ =|\[\[)", r"\1", example, flags=re.MULTILINE)), {}, {})
    assert [name for name, origin in origins.items() if origin == "default"] == []
    values = {name for name in NAMES if getattr(settings, name) != getattr(Settings(), name)}
    # Where the file cannot say the default, or the default depends on the user.
    assert values <= {
        "socket",
        "socket_mode",
        "budget",
        "pool",
        "books",
        "state_dir",
        "metrics",
        "model_roots",
        "preload",
    }
    assert settings.preload == (PreloadConfig("/srv/models/base", "base", "host"),)


def test_preloads_are_references_or_tables_and_say_where_they_stand(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """model_roots = ["/x"]
preload = [
  "org/name",  # a comment
  { ref = "/x/a, b", pin = true, device = "GPU-1A2B3C4D" },
]
""",
    )
    loaded = load(path, {}, {})
    assert loaded.settings.preload == (
        PreloadConfig("org/name"),
        PreloadConfig("/x/a, b", pin=True, device="GPU-1a2b3c4d"),
    )
    assert [entry.where for entry in loaded.settings.preload] == [f"{path}: line 3", f"{path}: line 4"]
    by_flags = load(path, {"preload": ["/a,/b", "/c"]}, {}).settings.preload
    assert by_flags == (PreloadConfig("/a"), PreloadConfig("/b"), PreloadConfig("/c"))
    assert by_flags[0].where == "--preload"
    assert load(path, {"preload": ""}, {}).settings.preload == ()


def test_preloads_are_printed_as_tables(tmp_path: Path) -> None:
    done = run("config", "--model-roots=/x", "--preload=/x/a", "--format=json")
    table = json.loads(done.stdout)
    assert table["model_roots"] == {"value": ["/x"], "origin": "--model-roots"}
    entry = {"ref": "/x/a", "name": "", "device": "", "pin": False, "wait": False}
    assert table["preload"] == {"value": [entry], "origin": "--preload"}


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    assert "over 1048576 bytes" in refused(toml(tmp_path, "#" * (1 << 20) + "\n"))


def test_limits_of_one_user() -> None:
    settings = Settings(max_user_leases=1, max_user_bytes="2K", max_user_offers=3, max_user_names=4)
    assert settings.limits == UserLimits(leases=1, bytes=2048, offers=3, names=4)
    assert [Settings(max_loads=n).loads_of_one for n in (1, 2, 4)] == [1, 1, 3]
    assert Settings(max_loads=4, max_user_loads=4).loads_of_one == 4


def test_its_json_says_the_same(tmp_path: Path) -> None:
    done = run("config", "--config", str(toml(tmp_path, "max_loads = 2\n")), "--format", "json")
    table = json.loads(done.stdout)
    assert list(table) == NAMES
    assert table["max_loads"] == {"value": 2, "origin": f"{tmp_path / 'weightd.toml'}: line 1"}


@pytest.mark.parametrize("command", ["config", "serve"])
def test_a_bad_configuration_exits_78_with_one_line(command: str) -> None:
    done = run(command, "--max-loads", "many")
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr == "weightd: --max-loads: 'many' is not a number\n"


def test_what_may_be_there_at_the_next_start_exits_75(tmp_path: Path) -> None:
    """A mount or a directory of users that is late must not keep a service down for good."""
    done = run("config", "--config", str(tmp_path / "late" / "weightd.toml"))
    assert (done.returncode, done.stdout) == (TemporaryConfigError.exit_code, "") == (75, "")
    assert done.stderr == f"weightd: {tmp_path}/late/weightd.toml: cannot be read: No such file or directory\n"
    done = run("config", "--admins", "nobody-of-that-name")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "weightd: --admins: admins = 'nobody-of-that-name': no user nobody-of-that-name\n"


@pytest.mark.parametrize("setting", ["--model-roots=weights", "--preload=/x/a"])
def test_a_user_who_may_be_known_later_hides_no_mistake(setting: str) -> None:
    """Trying again mends only one of them."""
    done = run("config", "--admins", "nobody-of-that-name", setting)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"weightd: {setting.partition('=')[0]}: ")


@pytest.mark.parametrize("budget", ["100TiB", "12"])
def test_a_budget_that_the_machine_does_not_have_is_refused(budget: str, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "weightd_daemon", "serve", f"--socket={tmp_path / 's'}", f"--budget={budget}"],
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert finished.returncode == 78
    assert finished.stderr.startswith(f"weightd: --budget: budget = {budget!r}: that of host must be from")


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("", None),
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:65535", ("::1", 65535)),
        ("/run/weightd/metrics.sock", Path("/run/weightd/metrics.sock")),
    ],
)
def test_where_monitors_read(said: str, address: tuple[str, int] | Path | None) -> None:
    assert load(None, {"metrics": said}, {}).settings.metrics_address == address


@pytest.mark.parametrize(("key", "path"), [("socket", ""), ("socket", "/"), ("socket", "."), ("metrics", "/")])
def test_a_path_that_names_no_file(key: str, path: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--{key}: {key} = '{re.escape(path)}': .*names no file; give the path of a socket"
    ):
        load(None, {key: path}, {})


@pytest.mark.parametrize("said", ["0.0.0.0:9464", "192.0.2.1:9464", "[::]:9464"])
def test_monitors_elsewhere_have_to_be_asked_for(said: str) -> None:
    with pytest.raises(ConfigError, match="unless metrics_access is remote"):
        load(None, {"metrics": said}, {})
    host, _, port = said.rpartition(":")
    settings = load(None, {"metrics": said, "metrics_access": "remote"}, {}).settings
    assert settings.metrics_address == (host.strip("[]"), int(port))


def test_config_whose_reader_has_gone_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "weightd_daemon", "config"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
